"""What the commands of `hf-polyattn` do, one module a command.

Each has `run(args)`, which takes the arguments that hf_polyattn_cli.py names, and returns the text to print: a report,
or JSON where args.json asks for it. A new command is an entry in COMMANDS there, and a module of its name here.
"""
