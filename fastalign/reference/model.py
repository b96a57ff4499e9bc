"""The reference model of a cache: knows its digest, loads itself only if something must be scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign.models import load_causal_lm
from fastalign.reference.identity import complete_identity, identity_digest, model_identity
from fastalign.reference.memo import FileIdentities, IdentityMemo, file_identities, memo_key
from fastalign.reference.scoring import ModelScorer

_ADAPTER_CONFIG = "adapter_config.json"
_LOADED_ADAPTER = "default"
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class ReferenceModel:
    """What `ReferenceCache.build` scores with. Make one with `from_model` or `from_pretrained`.

    temperature: the log-probs are those of logits / temperature. autocast: compute in this dtype under torch.autocast,
    as a trainer with bf16=True does over float32 weights; None: in the weights' own dtype. Both are in the digest.
    """

    def __init__(
        self, *, model: nn.Module | None, adapter: str | None, load: dict[str, Any] | None, source: str,
        temperature: float = 1.0, autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.source = source
        self._model, self._adapter, self._load_arguments = model, adapter, load
        self._temperature, self._autocast = temperature, autocast
        self._files: FileIdentities | None = None  # of the checkpoint, when its identity was taken or it was loaded
        self._part: dict[str, Any] | None = None  # identity of the checkpoint in those files

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        adapter: str | None = None,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
    ) -> ReferenceModel:
        """A model in memory, as it is when the cache is built: its tensors are hashed then, and not remembered.

        model: a transformers causal LM, or a PeftModel around one, wrapped (DDP, FSDP, torch.compile) or not.
        adapter: None: the reference is the base model, every adapter off (LoRA training against its own base).
            A name: base and that adapter, as for DPO with LoRA from an SFT with LoRA, whose adapter is kept under a
            second name (`load_adapter(sft, "reference")`). Its name does not enter the digest.
        """
        return cls(
            model=model, adapter=adapter, load=None, source=_source(model), temperature=temperature, autocast=autocast
        )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, adapter_path: str | Path | None = None, dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None, temperature: float = 1.0, autocast: torch.dtype | None = None,
        **load_arguments: Any,
    ) -> ReferenceModel:  # fmt: skip
        """A checkpoint, loaded only when it is needed: not at all when every sequence is cached already.

        name_or_path: a folder or a hub name. A folder with an adapter (adapter_config.json) stands for its base model
            with that adapter. adapter_path: a folder or hub name of an adapter on top of it.
        dtype: a dtype or "auto", the checkpoint's own. Loaded in another, the reference is another one.
        device: where it is scored. load_arguments: for `from_pretrained` (revision, attn_implementation, …).
        """
        load: dict[str, Any] = {
            "name": str(name_or_path),
            "adapter": None if adapter_path is None else str(adapter_path),
        }
        if (config := Path(name_or_path) / _ADAPTER_CONFIG).is_file():
            if adapter_path is not None:
                raise ValueError(
                    f"{name_or_path} is an adapter itself: give its base model beside adapter_path={adapter_path}"
                )
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
            if not base:
                raise ValueError(
                    f"{config} names no base_model_name_or_path: give the base model, and this as adapter_path"
                )
            load = {"name": base, "adapter": str(name_or_path)}
        load |= {"dtype": str(dtype).removeprefix("torch."), "device": device, "arguments": load_arguments}
        adapter = None if load["adapter"] is None else _LOADED_ADAPTER
        source = " + ".join(str(load[part]) for part in ("name", "adapter") if load[part])
        return cls(model=None, adapter=adapter, load=load, source=source, temperature=temperature, autocast=autocast)

    def identity(self, memo: IdentityMemo | None = None) -> dict[str, Any]:
        """The identity, see `fastalign.reference.identity`. memo: spares hashing a checkpoint whose files are known."""
        if self._load_arguments is None:
            part = model_identity(self._require_model(), self._adapter)
        else:
            part = self._remembered_identity(memo)
        return complete_identity(part, self._temperature, self._autocast)

    def digest(self, memo: IdentityMemo | None = None) -> str:
        """The reference digest: 64 hexadecimal digits."""
        return identity_digest(self.identity(memo))

    def scorer(self) -> ModelScorer:
        """A scorer over the model, which is loaded if it is not in memory. Use it as a context manager."""
        return ModelScorer(
            self._require_model(), adapter=self._adapter, temperature=self._temperature, autocast=self._autocast
        )

    def release(self) -> None:
        """Let go of a model that was loaded here; one that was handed in stays."""
        if self._load_arguments is not None:
            self._model = self._files = self._part = None

    def _remembered_identity(self, memo: IdentityMemo | None) -> dict[str, Any]:
        if self._model is None:
            files = self._read_files()
            if memo is not None and (known := memo.get(self._memo_key(files))) is not None:
                self._files, self._part = files, known
                return known
        if self._model is None or self._part is None:
            self._part = None  # of files that have changed since
            self._part = model_identity(self._require_model(), self._adapter)
            if memo is not None and self._files is not None:
                memo.put(self._memo_key(self._files), self._part)
        return self._part

    def _require_model(self) -> nn.Module:
        if self._model is None:
            before = self._files if self._part is not None and self._files is not None else self._read_files()
            model, after = self._load(), self._read_files()
            # a first load may fetch more files from the hub; once the digest is known, none may differ
            same = after == before if self._part is not None else before.items() <= after.items()
            if not same:
                raise ValueError(
                    f"the files of {self.source} changed while it was loaded as a reference, or since its digest was "
                    "taken: start again when they are finished"
                )
            self._model, self._files = model, after
        return self._model

    def _read_files(self) -> FileIdentities:
        load = self._checkpoint()
        hub = {name: value for name, value in load["arguments"].items() if name in _HUB_ARGUMENTS}
        folders = [_folder(load["name"], "config.json", **hub)]
        if load["adapter"] is not None:
            folders.append(_folder(load["adapter"], _ADAPTER_CONFIG))
        return file_identities(folders)

    def _memo_key(self, files: FileIdentities) -> str:
        load = self._checkpoint()
        # where the files came from is in their identities
        arguments = {name: repr(value) for name, value in load["arguments"].items() if name not in _HUB_ARGUMENTS}
        return memo_key(files, {"dtype": load["dtype"], **arguments})

    def _checkpoint(self) -> dict[str, Any]:
        assert self._load_arguments is not None
        return self._load_arguments

    def _load(self) -> nn.Module:
        load = self._checkpoint()
        model, info = load_causal_lm(load["name"], dtype=load["dtype"], output_loading_info=True, **load["arguments"])
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{load['name']} has no values for {len(missing)} tensors of the model, the first is {missing[0]}: "
                "they would be random, and so would the reference"
            )
        if load["adapter"] is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, load["adapter"], adapter_name=_LOADED_ADAPTER)
        return (model if load["device"] is None else model.to(load["device"])).eval()


def _source(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} in memory" + (f" ({name})" if name else "")


def _folder(name: str, file: str, **hub: Any) -> Path:
    """The local folder of a checkpoint: itself, or the hub's snapshot (its configuration is fetched if need be)."""
    if Path(name).is_dir():
        return Path(name) / (hub.get("subfolder") or "")
    from transformers.utils import cached_file

    found = cached_file(name, file, **hub)
    if found is None:
        raise ValueError(f"{name} is neither a folder nor a model on the hub with a {file}")
    return Path(found).parent
