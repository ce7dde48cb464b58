"""The cache that `generate` makes for a sparsified model: a `SparsifiedCache`, where nobody asks for another.

``GenerationMixin`` asks its method ``_prepare_cache_for_generation`` for the cache of a call. The one below takes its
place, and looks at the configuration of the very model that generates: that is where the patterns are, however the
model came by them (`sparsify`, ``from_pretrained``, a copy), and where they are gone when they are taken off. Every
model without patterns gets what transformers makes.
"""

from __future__ import annotations

from typing import Any

from torch import is_grad_enabled, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation import GenerationMode
from transformers.utils import logging

from longstride.errors import UnsupportedError
from longstride.integrations.transformers.cache import SparsifiedCache
from longstride.integrations.transformers.saved import ATTENTION
from longstride.models.cache import assisted_headroom

_logger = logging.get_logger(__name__)
_transformers_prepares: Any = GenerationMixin._prepare_cache_for_generation


def prepare_cache(
    self: Any,  # in a method's place
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Put the cache of a call of ``generate`` into its `model_kwargs`.

    A cache that is passed, ``use_cache=False`` and a ``cache_implementation`` are for transformers. So is a model that
    a SparsifiedCache cannot serve, and the log says once why.

    Args:
        self: the model that generates.
        generation_config, model_kwargs, generation_mode, batch_size: as transformers has them.
        max_cache_length: the most tokens a row that the call may come to, padding included.
    """
    asked = (
        model_kwargs.get("past_key_values") is not None
        or generation_config.use_cache is False
        or generation_config.cache_implementation is not None
    )
    if not asked and self._supports_default_dynamic_cache() and _decodes_along_patterns(self.config):
        headroom = assisted_headroom(generation_config) if generation_mode == GenerationMode.ASSISTED_GENERATION else 0
        try:
            _check_served(self, generation_config)
            # Guesses may go past the end.
            cache = SparsifiedCache(self.config, max(1, max_cache_length + headroom), headroom)
        except UnsupportedError as why:
            _logger.warning_once(f"generate() uses the cache of transformers and not a SparsifiedCache: {why}")
        else:
            model_kwargs["past_key_values"] = cache
            return
    _transformers_prepares(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def _decodes_along_patterns(config: PreTrainedConfig) -> bool:
    config = config.get_text_config(decoder=True)
    return config._attn_implementation == ATTENTION and hasattr(config, "longstride")


def _check_served(model: Any, generation_config: GenerationConfig) -> None:
    """Raise an UnsupportedError where this call needs a cache that grows, or one that holds other things elsewhere."""
    config = model.config.get_text_config(decoder=True)
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    heads = {
        tuple(getattr(layer, name, None) for name in ("head_dim", "num_key_value_groups"))
        for layer in attentions
        if getattr(layer, "config", None) is config  # and not of a vision model beside it
    }
    devices = {where for where in getattr(model, "hf_device_map", {}).values() if where not in ("cpu", "disk")}
    obstacles = {
        "it assists another model, and does not know how long the text will be": generation_config.is_assistant,
        "the model is compiled, and a compiled step takes a StaticCache (cache_implementation='static')": any(
            _is_compiled(module) and any(hasattr(inner, "is_causal") for inner in module.modules())
            for module in model.modules()
        ),
        "its cache keeps latents (kv_lora_rank), which become keys and values later": getattr(
            config, "kv_lora_rank", None
        )
        is not None,
        "some of its layers read the keys of others (num_kv_shared_layers)": bool(
            getattr(config, "num_kv_shared_layers", None)
        ),
        "its layers have heads of different sizes": len(heads) > 1,
        "its layers repeat what the cache gives, or attend to it twice": config.model_type in ("diffllama", "jetmoe"),
        "its layers or heads are on several devices": len(devices) > 1 or (getattr(model, "_tp_size", None) or 1) > 1,
        "an adapter puts tokens of its own before the given ones, and the call does not count them": _is_prompted(
            model
        ),
        "gradients are wanted, and it would keep none": is_grad_enabled(),
    }
    for what, found in obstacles.items():
        if found:
            raise UnsupportedError(what)


def _is_prompted(model: Any) -> bool:
    """Whether a wrapper as PEFT's prepares the model's inputs, with prompts of its own."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", None)
    return bool(getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False))


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module, or its forward, was given to torch.compile in one of its three forms."""
    return (
        module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        or "_orig_mod" in module._modules
    )
