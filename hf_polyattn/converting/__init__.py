"""The conversion of a pretrained checkpoint as one job: stages, resume, a report. `convert` in `pipeline` runs it."""
