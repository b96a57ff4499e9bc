"""The last decoder layer, computed only for the tokens whose hidden states will be read.

Keys and values of the last layer are needed from every token; its queries, the projection of what attention gives them
and its MLP only from those that are scored. Hooks on these modules take the rows that `Segments.needed` names and leave
zeros for the others, whose hidden states are then meaningless. Which rows those are comes in with the keyword
`segments` of the attention module, so that a layer that is recomputed for its gradients takes the same ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_ATTENTION = ("self_attn", "attention", "attn")
_ROWWISE = ("q_proj", "o_proj", "out_proj", "dense", "c_proj")  # of an attention module: one row in, one row out
_MLP = ("mlp", "feed_forward")
_WORTHWHILE = 0.9
"""Above this share of needed tokens, gathering and scattering cost what they save."""


class LastLayer:
    """The hooks on the last layer of a backbone. ValueError, naming what is missing: its layers are not like that."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        layer = _last_layer(backbone)
        attention, mlp = _child(layer, _ATTENTION), _child(layer, _MLP)
        self._rows: Tensor | None = None
        self._handles: list[RemovableHandle] = [attention.register_forward_pre_hook(self._tell, with_kwargs=True)]
        modules = [mlp, *(part for name in _ROWWISE if (part := getattr(attention, name, None)) is not None)]
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._pick))
            self._handles.append(module.register_forward_hook(self._put))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # Bound methods: a copy of the model gets hooks of its own.

    def _tell(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        segments = kwargs.get("segments")
        self._rows = None
        if segments is not None and segments.needed is not None:
            total = segments.shape[0] * segments.shape[1]
            if len(segments.needed) <= _WORTHWHILE * total:
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                self._rows = segments.needed_on(hidden.device)
                self._total = total

    def _pick(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._rows is None:
            return None
        self._shape = args[0].shape[:-1]
        return args[0].flatten(0, -2).index_select(0, self._rows)[None], *args[1:]

    def _put(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        if not isinstance(output, Tensor):
            raise ValueError(f"{type(module).__name__} returns a {type(output).__name__}")
        whole = output.new_zeros(self._total, output.shape[-1])
        return whole.index_copy(0, self._rows, output[0]).view(*self._shape, output.shape[-1])


def _last_layer(backbone: PreTrainedModel) -> nn.Module:
    count = getattr(backbone.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for module in backbone.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[-1]
    raise ValueError(f"{type(backbone).__name__} has no list of {count} decoder layers")


def _child(parent: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        if isinstance(module := getattr(parent, name, None), nn.Module):
            return module
    raise ValueError(f"{type(parent).__name__} has none of {', '.join(names)}")
