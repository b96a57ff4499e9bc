"""`DPOConfig`: the settings of DPO training beside those that all trainers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastalign.losses import DPO_LOSSES, F_DIVERGENCES, DPOLoss, DPOOptions, check_dpo_options
from fastalign.trainers.config import REFUSED, described
from fastalign.trainers.reference_config import ReferenceConfig


def _default(option: str) -> Any:
    return DPOOptions._field_defaults[option]


@dataclass
class DPOConfig(ReferenceConfig):
    """Settings of `DPOTrainer`: TRL's names where TRL has one, over `ReferenceConfig`. learning_rate is 1e-6.

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=1e-6, metadata=described("Peak learning rate of AdamW."))

    # ---- loss
    beta: float = field(
        default=_default("beta"),
        metadata=described("Strength of the tie to the reference; in ipo the paper's tau, in orpo its lambda."),
    )
    loss_type: str | list[str] = field(
        default="sigmoid",
        metadata=described(
            "Variant of the preference loss, or several on pairs whose weighted sum is taken. kto, bco and "
            "apo_zero_unpaired learn from prompt, completion and label; pairs are taken apart for them. aot and "
            "aot_unpaired sort over per_device_train_batch_size pairs, a batch that is never cut.",
            choices=tuple(DPO_LOSSES),
        ),
    )
    loss_weights: list[float] | None = field(
        default=None, metadata=described("Weights of the losses in loss_type; by default 1 each.")
    )
    label_smoothing: float = field(
        default=_default("label_smoothing"),
        metadata=described("Share of preferences taken to be flipped, in [0, 0.5)."),
    )
    length_alpha: float = field(
        default=_default("length_alpha"),
        metadata=described(
            "Length penalty of R-DPO in reward units per token: a longer chosen response is pushed less. 0 is DPO."
        ),
    )
    f_divergence_type: str = field(
        default=_default("f_divergence_type"),
        metadata=described("Divergence from the reference, for losses of the reward difference.", tuple(F_DIVERGENCES)),
    )
    f_alpha_divergence_coef: float = field(
        default=_default("f_alpha_divergence_coef"), metadata=described("Exponent of alpha_divergence.")
    )
    ld_alpha: float | None = field(
        default=None,
        metadata=described(
            "LD-DPO: weight in [0, 1] of the tokens by which one response is longer than the other, in policy and "
            "reference; 1 weighs nothing."
        ),
    )
    use_weighting: bool = field(
        default=False,
        metadata=described("WPO: weigh a pair by how probable the policy finds its responses, tokens averaged."),
    )
    discopop_tau: float = field(
        default=_default("discopop_tau"), metadata=described("Temperature of discopop's modulation.")
    )
    simpo_gamma: float = field(
        default=_default("simpo_gamma"), metadata=described("Target margin of simpo, in units of its reward.")
    )
    cpo_alpha: float = field(default=_default("cpo_alpha"), metadata=described("Weight of cpo's cross-entropy."))
    desirable_weight: float = field(
        default=_default("desirable_weight"), metadata=described("Weight of good responses where they stand alone.")
    )
    undesirable_weight: float = field(
        default=_default("undesirable_weight"), metadata=described("Weight of bad responses where they stand alone.")
    )
    bco_running_shift: bool = field(
        default=False,
        metadata=described(
            "bco_pair: measure rewards from the running mean of those before, as bco always does; it is kept in "
            "checkpoints."
        ),
    )
    token_metrics: bool = field(
        default=True, metadata=described("Also log entropy, mean_token_accuracy, logits/chosen and logits/rejected.")
    )

    # ---- reference
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata=described(
            "Score the reference before training, once, and keep its log-probs in cache_dir. false: it stays in memory "
            "and scores each batch. By default true, with sync_ref_model false."
        ),
    )
    sync_ref_model: bool = field(
        default=False,
        metadata=described(
            "TR-DPO: mix the policy into the reference, which stays in memory and is saved in checkpoints. Not with "
            "adapters."
        ),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=described("Share of the policy in the mixed reference, in (0, 1].")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=described("Mix the reference every so many optimizer steps.")
    )

    # ---- TRL's options that are not supported, with the one value each may have
    precompute_ref_batch_size: int | None = field(
        default=None, metadata=described(f"{REFUSED} precompute_ref_batch_tokens bounds a batch.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1 and self.loss_weights is None:
            self.loss_type = self.loss_type[0]
        variants = check_dpo_options(**{name: getattr(self, name) for name in DPOOptions._fields})
        if self.bco_running_shift and not any(variant.accepts_shift for variant in variants):
            able = ", ".join(repr(name) for name, entry in DPO_LOSSES.items() if entry.accepts_shift)
            raise ValueError(f"bco_running_shift=True has no effect on loss_type={self.loss_type!r}: {able} take it")
        self._check_batches()
        self._settle_reference()

    # ---- what the loss asks for

    def loss_options(self) -> dict[str, Any]:
        """The options of `losses.dpo_loss`, or of `losses.kto_loss`, as they are set here."""
        weights = ("desirable_weight", "undesirable_weight")
        of_pairs = [name for name in DPOOptions._fields if name not in weights]
        return {name: getattr(self, name) for name in (of_pairs if self.on_pairs else ("beta", "loss_type", *weights))}

    @property
    def variants(self) -> tuple[DPOLoss, ...]:
        """The entries of `DPO_LOSSES` that loss_type names."""
        return tuple(DPO_LOSSES[name] for name in self.loss_types)

    @property
    def loss_types(self) -> tuple[str, ...]:
        return DPOOptions(loss_type=self.loss_type).loss_types

    @property
    def on_pairs(self) -> bool:
        return all(variant.rows == "pairs" for variant in self.variants)

    @property
    def needs_reference(self) -> bool:
        return any(variant.needs_reference for variant in self.variants)

    @property
    def couples_batch(self) -> bool:
        return any(variant.couples_batch for variant in self.variants)

    @property
    def needs_kl(self) -> bool:
        return any(variant.needs_kl for variant in self.variants)

    @property
    def has_running_shift(self) -> bool:
        return self.bco_running_shift or any(variant.needs_shift for variant in self.variants)

    # ---- checks

    def _check_batches(self) -> None:
        if not self.couples_batch:
            return
        if self.max_tokens_per_batch is not None:
            raise ValueError(
                f"max_tokens_per_batch={self.max_tokens_per_batch}: loss_type={self.loss_type!r} sorts over the device "
                "batch, whose number of pairs must stay the same; set per_device_train_batch_size"
            )
        if self.micro_batch_tokens:
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens!r}: loss_type={self.loss_type!r} sorts over the device "
                "batch, which must not be cut; accepted is 0"
            )
        if self.schedule == "streamed":
            raise ValueError(
                f"schedule='streamed': loss_type={self.loss_type!r} is no sum over pairs; accepted are 'auto' and "
                "'deferred'"
            )

    def _settle_reference(self) -> None:
        """Decide where the reference is, and refuse settings of the other places."""
        if not self.sync_ref_model:
            self._refuse(("ref_model_mixup_alpha", "ref_model_sync_steps"), "has no effect without sync_ref_model=True")
        if not self.needs_reference:
            names = ("ref_model_name_or_path", "sync_ref_model", "precompute_ref_batch_tokens")
            self._refuse(names, f"has no effect: loss_type={self.loss_type!r} has no reference")
            if self.precompute_ref_log_probs:
                raise ValueError(f"precompute_ref_log_probs=True: loss_type={self.loss_type!r} has no reference")
            self.precompute_ref_log_probs = False
            return
        if self.sync_ref_model:
            self._check_sync()
        elif self.precompute_ref_log_probs is None:
            self.precompute_ref_log_probs = True
        if not self.precompute_ref_log_probs:
            self._refuse(("precompute_ref_batch_tokens",), "has no effect: the reference is not scored beforehand")

    def _check_sync(self) -> None:
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs=True with sync_ref_model=True: log-probs from before training are not those "
                "of a reference that changes; accepted is False"
            )
        if self.use_peft:
            raise ValueError("sync_ref_model=True mixes whole models, and use_peft=True trains an adapter: choose one")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha}: it must be in (0, 1]")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps={self.ref_model_sync_steps}: it must be at least 1")
        self.precompute_ref_log_probs = False

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} {reason}")
