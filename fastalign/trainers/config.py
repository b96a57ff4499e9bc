"""`TrainerConfig`: the settings that all trainers share, documented once, in each field's `help`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import ParallelMode
from transformers.utils import is_torch_bf16_gpu_available

from fastalign.data.formats import FORMATS
from fastalign.data.length import ON_LONG_PROMPT, TRUNCATION_MODES
from fastalign.data.preferences import ON_BAD_ROW
from fastalign.ops.backends import BACKENDS
from fastalign.ops.schedule import SCHEDULES
from fastalign.trainers.guards import ACTIONS as BAD_STEP_ACTIONS
from fastalign.trainers.guards import StepGuard
from fastalign.trainers.token_settings import TOKEN_LAYOUTS, check_token_settings, padding_multiple, pass_tokens
from fastalign.trainers.zero import load_whole_models

# Constants per device type, never derived from free memory: the same run does the same work everywhere.
DEFAULT_MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# These may be given as text, and are what type checkers see once __post_init__ has seen them.
if TYPE_CHECKING:
    _Multiple = int | None
    _PassTokens = int | Literal["auto"] | None
else:
    _Multiple = _PassTokens = int | str | None
REFUSED = "Not supported yet: any other value is refused."


def described(text: str, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """A field's metadata: its help, and the values it accepts where they can be listed."""
    return {"help": text} if choices is None else {"help": text, "choices": choices}


@dataclass
class TrainerConfig(TrainingArguments):
    """Settings of every trainer: TRL's names where TRL has one, over transformers' TrainingArguments.

    Defaults that differ from TrainingArguments': logging_steps 10, gradient_checkpointing True, bf16 where the GPU
    computes in it (TRL's three); logging_nan_inf_filter False, because the filter hides a diverged run and costs a
    device synchronisation a step.

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    # ---- TrainingArguments' fields with other defaults
    logging_steps: float = field(
        default=10, metadata=described("Log every so many optimizer steps; below 1, a share of all steps.")
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=described("Leave nan and inf out of the logged loss. Hides a diverged run.")
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata=described(
            "Recompute activations in the backward: less memory, about a third more time. On unless set to false."
        ),
    )
    bf16: bool | None = field(
        default=None,
        metadata=described(
            "Compute in bfloat16 autocast over float32 weights. On by default where the GPU does so natively."
        ),
    )

    # ---- model
    model_name_or_path: str | None = field(
        default=None, metadata=described("Folder or hub name of the model that training starts from.")
    )
    model_revision: str | None = field(default=None, metadata=described("Branch, tag or commit of a hub model."))
    dtype: str = field(
        default="auto",
        metadata=described(
            "Precision the model is loaded in. auto: float32 for weights that train, the checkpoint's own for a base "
            "frozen under LoRA. bfloat16 trains in pure bfloat16, in which small updates round to nothing.",
            choices=_DTYPES,
        ),
    )
    attn_implementation: str | None = field(
        default=None, metadata=described("Attention of transformers: sdpa, eager, flash_attention_2, ...")
    )
    trust_remote_code: bool = field(default=False, metadata=described("Run model code that comes with a checkpoint."))
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=described("Further arguments of from_pretrained for every model given by name."),
    )
    disable_dropout: bool = field(
        default=True,
        metadata=described("Turn off the dropout of the model that is handed in; a new adapter has lora_dropout."),
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=described(
            "Weight of a mixture of experts' load-balancing loss; by default the model config's, 0 is off."
        ),
    )

    # ---- data
    dataset_name: str | None = field(default=None, metadata=described("Data: a file, a folder or a hub name."))
    dataset_config: str | None = field(default=None, metadata=described("Configuration (subset) of a hub data set."))
    dataset_train_split: str = field(
        default="train", metadata=described("Split to train on; slices as in train[:900] are taken.")
    )
    dataset_test_split: str | None = field(default=None, metadata=described("Split to evaluate on; none unless given."))
    dataset_format: str = field(
        default="auto",
        metadata=described(
            "How rows reach the model: auto turns transcripts into chat where there is a template.", choices=FORMATS
        ),
    )
    max_samples: int | None = field(default=None, metadata=described("Read at most so many rows of each data set."))
    max_length: int | None = field(
        default=1024, metadata=described("Tokens of prompt and response together; null is no limit.")
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=described(
            "What a longer row loses: the response's end, or the prompt's start.", choices=TRUNCATION_MODES
        ),
    )
    on_long_prompt: str = field(
        default="drop",
        metadata=described("What becomes of a row whose prompt alone fills max_length.", choices=ON_LONG_PROMPT),
    )
    on_bad_row: str = field(
        default="error", metadata=described("Refuse a data set with bad rows, or leave them out.", choices=ON_BAD_ROW)
    )
    pad_to_multiple_of: _Multiple = field(
        default=None,
        metadata=described("Pad sequences to a multiple of this length. auto and null: to the longest of a batch."),
    )

    # ---- engine
    micro_batch_tokens: _PassTokens = field(
        default=None,
        metadata=described(
            "Tokens that one forward and backward pass computes, padding included. A larger device batch is cut "
            "between examples, longest first, and its gradients added up: the same update with less padding and "
            "memory. 0 never cuts; auto plans how many fit into memory_gb. By default "
            + ", ".join(f"{tokens} on {device}" for device, tokens in DEFAULT_MICRO_BATCH_TOKENS.items())
            + "."
        ),
    )
    memory_gb: float | None = field(
        default=None,
        metadata=described(
            "GiB that micro_batch_tokens=auto may plan for; by default nine tenths of the GPU's, on the CPU it has to "
            "be given."
        ),
    )
    token_layout: str = field(
        default="auto",
        metadata=described(
            "How tokens go through the model. padded: each sequence in a row of its own; packed: end to end, without "
            "padding; shared: packed, and what the responses to one prompt have in common is computed once. Loss and "
            "gradients are the same. auto: shared where the model allows it, else packed, else padded.",
            choices=TOKEN_LAYOUTS,
        ),
    )
    padding_free: bool = field(default=False, metadata=described("TRL's name for token_layout='packed'."))
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=described(
            "Computed tokens of a device's training batch, in place of per_device_train_batch_size: batches hold as "
            "many examples as fit, other ones every epoch, as the seed has it."
        ),
    )
    backend: str = field(
        default="auto", metadata=described("Implementation of the head's row kernels.", choices=("auto", *BACKENDS))
    )
    schedule: str = field(
        default="auto", metadata=described("Schedule of the head; auto plans by shape.", choices=("auto", *SCHEDULES))
    )
    workspace_mb: float | None = field(
        default=None, metadata=described("Working memory of the head in MiB; by default 128 on cpu, 1024 on cuda.")
    )

    # ---- LoRA
    use_peft: bool = field(default=False, metadata=described("Train a LoRA adapter; the base stays frozen."))
    lora_r: int = field(default=16, metadata=described("Rank of the adapter."))
    lora_alpha: int = field(
        default=32, metadata=described("Scale of the adapter: its update is multiplied by lora_alpha / lora_r.")
    )
    lora_dropout: float = field(default=0.0, metadata=described("Dropout on the adapter's input."))
    lora_target_modules: list[str] | None = field(
        default=None, metadata=described("Modules that get an adapter; by default PEFT's choice.")
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=described("Modules that train in full beside the adapter.")
    )
    merge_adapter: bool = field(
        default=False, metadata=described("Also save base and adapter merged into one model, in output_dir/merged.")
    )

    # ---- checkpoints
    async_save: bool = field(
        default=False,
        metadata=described(
            "Write checkpoints while training goes on: a step waits only for a copy of weights and optimizer state to "
            "host memory, and training ends with the last one in place."
        ),
    )

    # ---- steps that cannot be trusted
    on_bad_step: str = field(
        default="stop",
        metadata=described(
            "Stop before a step whose loss or gradient is not finite or beyond the two limits below, leave it out, or "
            "look at nothing; its rows are written to output_dir/bad_steps.jsonl.",
            choices=BAD_STEP_ACTIONS,
        ),
    )
    grad_norm_limit: float | None = field(
        default=None, metadata=described("A gradient's norm above it, before clipping, makes a step bad.")
    )
    loss_spike: float | None = field(
        default=None,
        metadata=described("A loss so many deviations above the median of the last 100 steps makes a step bad."),
    )

    # ---- TRL's options that are not supported, with the one value each may have
    activation_offloading: bool = field(default=False, metadata=described(REFUSED))
    dataset_num_proc: int | None = field(
        default=None, metadata=described(f"{REFUSED} Tokenisation is batched in one process.")
    )
    pad_token: str | None = field(
        default=None, metadata=described(f"{REFUSED} Set it on the tokenizer; any token will do.")
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        for spec in fields(self):  # argument parsers of transformers and TRL give None for the default of a list
            if "list[" in str(spec.type) and getattr(self, spec.name) is None and isinstance(spec.default, str):
                setattr(self, spec.name, spec.default)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        self.pad_to_multiple_of = padding_multiple(self.pad_to_multiple_of)
        self.micro_batch_tokens = pass_tokens(self.micro_batch_tokens)
        self._resolve_checkpointing()
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            load_whole_models()
        self._refuse_unsupported()
        self._check_values()
        check_token_settings(self)
        StepGuard(self.on_bad_step, self.grad_norm_limit, self.loss_spike)  # checks the three

    def _resolve_checkpointing(self) -> None:
        """On by default. Newer transformers call it activation_checkpointing and warn of the name that people know."""
        for suffix in ("", "_kwargs"):
            old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
            if hasattr(self, new):
                if getattr(self, new) is None:
                    setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        name = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        if getattr(self, name) is None:
            setattr(self, name, True)

    def _refuse_unsupported(self) -> None:
        fields = type(self).__dataclass_fields__
        for name, spec in fields.items():
            if spec.metadata.get("help", "").startswith(REFUSED) and getattr(self, name) != spec.default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported yet; accepted is {spec.default!r}. "
                    + spec.metadata["help"].removeprefix(REFUSED).strip()
                )
        others = {
            "label_smoothing_factor": (0, "no logits exist to smooth over"),
            "use_liger_kernel": (False, "it replaces the forward that hands hidden states to the fused head"),
            "torch_compile": (False, "the loss enters the forward as a function of each batch"),
            "batch_eval_metrics": (False, "no logits exist to compute metrics from"),
        }
        for name, (accepted, reason) in others.items():
            if getattr(self, name, accepted) != accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}; accepted is {accepted!r}")
        if self.async_save and self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"async_save=True with hub_strategy={str(self.hub_strategy)!r}, which pushes a checkpoint as soon as "
                "it is saved, is not supported; accepted is 'end'"
            )
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError("fsdp shards over several processes and this is one: start it with torchrun or accelerate")

    def _check_values(self) -> None:
        positive = ("lora_r", "lora_alpha", "workspace_mb")
        for name in positive:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value}: it must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: it must be in [0, 1)")
        if self.dtype in ("bfloat16", "float16") and self.fp16:
            raise ValueError(f"dtype={self.dtype!r} with fp16=True: the gradient scaler needs float32 weights")
        for name, choices in (("dtype", _DTYPES), ("dataset_format", FORMATS), ("on_bad_row", ON_BAD_ROW)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(choices)}")


def by_device(given: int | None, defaults: dict[str, int], args: TrainerConfig) -> int:
    """A setting, or its default for the device of this run."""
    return defaults.get(args.device.type, defaults["cuda"]) if given is None else given
