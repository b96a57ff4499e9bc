"""What a `TrainerConfig` may say of how tokens are batched and go through the model, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastalign.trainers.config import TrainerConfig

TOKEN_LAYOUTS = ("auto", "padded", "packed", "shared")


def whole_number(given: int | str | None) -> int | str | None:
    """A setting that is a whole number or a word: text that spells a number as that number."""
    return int(given) if isinstance(given, str) and given.strip().isdecimal() else given


def padding_multiple(given: int | str | None) -> int | None:
    """`pad_to_multiple_of` as a number: TRL takes it as text too, and "auto", which pads on AWS Trainium alone."""
    if given is None or (isinstance(given, str) and given.lower() in ("auto", "none", "null")):
        return None
    number = whole_number(given)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"pad_to_multiple_of={given!r}: a positive whole number, 'auto' or None is accepted")
    return number


def pass_tokens(given: int | str | None) -> int | Literal["auto"] | None:
    """`micro_batch_tokens` as a number, "auto" or None."""
    number = whole_number(given)
    if number is None or (isinstance(number, str) and number.lower() in ("none", "null")):
        return None
    if isinstance(number, str) and number.lower() == "auto":
        return "auto"
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(
            f"micro_batch_tokens={given!r}: accepted are a whole number of tokens, 0 for no limit, and 'auto', which "
            "plans for memory_gb"
        )
    return number


def check_token_settings(config: TrainerConfig) -> None:
    """Raise ValueError, naming the field, what was given and what is accepted, for what cannot be honoured."""
    _check_memory(config)
    _check_layout(config)
    _check_batches(config)


def _check_memory(config: TrainerConfig) -> None:
    memory = config.memory_gb
    if config.micro_batch_tokens != "auto":
        if memory is not None:
            raise ValueError(f"memory_gb={memory} has no effect without micro_batch_tokens='auto'")
        return
    if memory is not None and not memory > 0:
        raise ValueError(f"memory_gb={memory}: it must be positive")
    if memory is None and config.device.type == "cpu":
        raise ValueError(
            "micro_batch_tokens='auto' needs memory_gb on the CPU, whose memory other processes share: the GiB that "
            "this run may take"
        )


def _check_layout(config: TrainerConfig) -> None:
    if config.token_layout not in TOKEN_LAYOUTS:
        raise ValueError(f"token_layout={config.token_layout!r}: accepted are {', '.join(TOKEN_LAYOUTS)}")
    if config.padding_free:
        if config.token_layout == "padded":
            raise ValueError("padding_free=True with token_layout='padded': leave out one of the two")
        if config.token_layout == "auto":
            config.token_layout = "packed"
    if config.pad_to_multiple_of is not None and config.token_layout in ("packed", "shared"):
        raise ValueError(
            f"pad_to_multiple_of={config.pad_to_multiple_of} with token_layout={config.token_layout!r}, which has no "
            "padding: leave out one of the two"
        )


def _check_batches(config: TrainerConfig) -> None:
    if (budget := config.max_tokens_per_batch) is None:
        return
    if budget < 1:
        raise ValueError(f"max_tokens_per_batch={budget}: a positive number of tokens is accepted")
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"max_tokens_per_batch with train_sampling_strategy={config.train_sampling_strategy!r}: batches are made "
            "by length already; accepted are 'random' and 'sequential'"
        )
    if config.auto_find_batch_size:
        raise ValueError("auto_find_batch_size has no effect with max_tokens_per_batch: leave out one of the two")
    for name, accepted in (("split_batches", False), ("even_batches", True), ("dispatch_batches", None)):
        if (value := getattr(config.accelerator_config, name, accepted)) != accepted:
            raise ValueError(
                f"accelerator_config {name}={value!r} with max_tokens_per_batch, whose batches are shared out when "
                f"they are made; accepted is {accepted!r}"
            )
