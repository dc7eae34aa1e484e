"""What a patch could leave behind, and how a refusal is asked for."""

import pytest

from hf_polyattn import patch_model


def traces(model):
    """Everything about a model that a patch could leave behind."""
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    names = (model.config._attn_implementation, model.name_or_path, *(model.model_tags or ()))
    return classes, attributes, hooks, list(model.state_dict()), model.config.to_dict(), names


def refuses(match, model, *args, error=ValueError, **options):
    with pytest.raises(error, match=match):
        patch_model(model, *args, **options)
