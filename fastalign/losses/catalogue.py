"""The one list of preference losses. A new variant is a function of `Pairs` or `Responses` and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastalign.losses import pairwise, responses
from fastalign.losses.terms import DPOOptions

_ALIASES = {"f_divergence": "f_divergence_type", "weighting": "use_weighting"}

# options that go together
_F_DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
_WEIGHTS = ("ld_alpha", "use_weighting")
_DIFFERENCE = ("beta", "length_alpha", *_F_DIVERGENCE, *_WEIGHTS)
_RESPONSES = ("beta", "desirable_weight", "undesirable_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOLoss:
    """A variant of the preference loss, what it needs, and the options it honours; the others are refused.

    `accepts_<option>` is a bool for every option of `dpo_loss` and `kto_loss` ("f_divergence" and "weighting" for
    short). `length_alpha` is accepted where the loss is a function of the reward difference z alone: there the implicit
    reward βs becomes βs + α|y| and nothing else changes.
    """

    fn: Callable[..., Tensor]  # Pairs -> (P,), Responses -> (S,)
    formula: str  # in the letters of `terms`, with ε = label_smoothing, m = logps/|y|, σ the logistic function
    source: str
    options: tuple[str, ...]  # names of the options it honours
    rows: str = "pairs"  # what one row of its data is: "pairs" or "responses"
    needs_reference: bool = True
    needs_lengths: bool = False
    couples_batch: bool = False  # no sum over pairs: a batch cannot be done in pieces
    needs_kl: bool = False
    needs_shift: bool = False  # made to be centred by a running mean δ of the rewards
    accepts_shift: bool = False
    mean_rewards: bool = False  # its reward is β·m, not β·logps

    def __getattr__(self, name: str) -> bool:
        option = name.removeprefix("accepts_")
        option = _ALIASES.get(option, option)
        if name.startswith("accepts_") and option in DPOOptions._fields:
            return option in self.options
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


DPO_LOSSES: dict[str, DPOLoss] = {
    "sigmoid": DPOLoss(
        fn=pairwise.sigmoid,
        formula="−(1−ε)·log σ(z) − ε·log σ(−z)",
        source="DPO, arXiv 2305.18290 eq. 7; with ε cDPO, E. Mitchell 2023; with α R-DPO, arXiv 2403.19159 eq. 9",
        options=("label_smoothing", *_DIFFERENCE),
    ),
    "robust": DPOLoss(
        fn=pairwise.robust,
        formula="[−(1−ε)·log σ(z) + ε·log σ(−z)] / (1 − 2ε)",
        source="rDPO, arXiv 2403.00409",
        options=("label_smoothing", *_DIFFERENCE),
    ),
    "hinge": DPOLoss(
        fn=pairwise.hinge,
        formula="max(0, 1 − z)",
        source="SLiC-HF, arXiv 2305.10425, on DPO's rewards as in RSO, arXiv 2309.06657",
        options=_DIFFERENCE,
    ),
    "ipo": DPOLoss(
        fn=pairwise.ipo,
        formula="(f(s_w)/|y_w| − f(s_l)/|y_l| − 1/(2β))²",
        source="IPO, arXiv 2310.12036 eq. 17, averaged over the length as its authors confirmed",
        options=("beta", *_F_DIVERGENCE, *_WEIGHTS),
        needs_lengths=True,
    ),
    "sigmoid_norm": DPOLoss(
        fn=pairwise.sigmoid_norm,
        formula="−log σ(β(f(s_w)/|y_w| − f(s_l)/|y_l|))",
        source="length-normalised DPO, Tülu 3, arXiv 2411.15124",
        options=("beta", *_F_DIVERGENCE, *_WEIGHTS),
        needs_lengths=True,
    ),
    "exo_pair": DPOLoss(
        fn=pairwise.exo_pair,
        formula="σ(z)·[log σ(z) − log(1−ε)] + σ(−z)·[log σ(−z) − log ε],  ε > 0",
        source="EXO, arXiv 2402.00856 eq. 16",
        options=("label_smoothing", *_DIFFERENCE),
    ),
    "nca_pair": DPOLoss(
        fn=pairwise.nca_pair,
        formula="−log σ(βs_w) − ½·log σ(−βs_w) − ½·log σ(−βs_l)",
        source="NCA, arXiv 2402.05369",
        options=("beta", *_WEIGHTS),
    ),
    "bco_pair": DPOLoss(
        fn=pairwise.bco_pair,
        formula="−log σ(βs_w − δ) − log σ(−(βs_l − δ)),  δ = 0 unless given as shift",
        source="BCO, arXiv 2404.04656, on pairs",
        options=("beta", *_WEIGHTS),
        accepts_shift=True,
    ),
    "sppo_hard": DPOLoss(
        fn=pairwise.sppo_hard,
        formula="(s_w − 1/(2β))² + (s_l + 1/(2β))²",
        source="SPPO, arXiv 2405.00675 eq. 4.7 with certain preferences",
        options=("beta", *_WEIGHTS),
    ),
    "aot": DPOLoss(
        fn=pairwise.aot,
        formula="−(1−ε)·log σ(u_k) − ε·log σ(−u_k),  u = β(sort(logps_w − logps_l) − sort(ref_logps_w − ref_logps_l))",
        source="AOT, paired, arXiv 2406.05882",
        options=("beta", "label_smoothing", "ld_alpha"),
        couples_batch=True,
    ),
    "aot_unpaired": DPOLoss(
        fn=pairwise.aot_unpaired,
        formula="−(1−ε)·log σ(u_k) − ε·log σ(−u_k),  u = β(sort(s_w) − sort(s_l))",
        source="AOT, unpaired, arXiv 2406.05882",
        options=("beta", "label_smoothing", "ld_alpha"),
        couples_batch=True,
    ),
    "apo_zero": DPOLoss(
        fn=pairwise.apo_zero,
        formula="(1 − σ(βs_w)) + σ(βs_l)",
        source="APO, arXiv 2408.06266 eq. 7: chosen responses better than the policy's own",
        options=("beta", *_WEIGHTS),
    ),
    "apo_down": DPOLoss(
        fn=pairwise.apo_down,
        formula="σ(βs_w) + (1 − σ(β(s_w − s_l)))",
        source="APO, arXiv 2408.06266 eq. 8: chosen responses worse than the policy's own",
        options=("beta", *_WEIGHTS),
    ),
    "discopop": DPOLoss(
        fn=pairwise.discopop,
        formula="−(1 − σ(z/τ))·log σ(z) + σ(z/τ)·exp(−z),  τ = discopop_tau",
        source="DiscoPOP's log-ratio modulated loss, arXiv 2406.08414 eq. 5",
        options=("discopop_tau", *_DIFFERENCE),
    ),
    "sft": DPOLoss(
        fn=pairwise.sft,
        formula="−logps_w · P / Σ|y_w|, whose mean over the P pairs is the cross-entropy of the chosen tokens",
        source="a term to add, as in RPO, arXiv 2404.19733, and MPO, arXiv 2411.10442",
        options=("use_weighting",),
        needs_reference=False,
        needs_lengths=True,
    ),
    "simpo": DPOLoss(
        fn=pairwise.simpo,
        formula="−(1−ε)·log σ(u) − ε·log σ(−u),  u = β(logps_w/|y_w| − logps_l/|y_l|) − γ,  γ = simpo_gamma",
        source="SimPO, arXiv 2405.14734",
        options=("beta", "simpo_gamma", "label_smoothing", "use_weighting"),
        needs_reference=False,
        needs_lengths=True,
        mean_rewards=True,
    ),
    "orpo": DPOLoss(
        fn=pairwise.orpo,
        formula="−m_w − β·log σ(o_w − o_l),  o = m − log(1 − eᵐ),  m_w = logps_w/|y_w|;  β is the paper's λ",
        source="ORPO, arXiv 2403.07691 eq. 6 and 7",
        options=("beta", "use_weighting"),
        needs_reference=False,
        needs_lengths=True,
        mean_rewards=True,
    ),
    "cpo": DPOLoss(
        fn=pairwise.cpo,
        formula="−(1−ε)·log σ(u) − ε·log σ(−u) − λ·logps_w/|y_w|,  u = β(logps_w − logps_l),  λ = cpo_alpha",
        source="CPO, arXiv 2401.08417",
        options=("beta", "cpo_alpha", "label_smoothing", "use_weighting"),
        needs_reference=False,
        needs_lengths=True,
    ),
    "kto": DPOLoss(
        fn=responses.kto,
        formula="λ_D·(1 − σ(β(s − z₀))) if desirable, λ_U·(1 − σ(β(z₀ − s))) if not,  z₀ = max(0, kl)",
        source="KTO, arXiv 2402.01306",
        options=_RESPONSES,
        rows="responses",
        needs_kl=True,
    ),
    "bco": DPOLoss(
        fn=responses.bco,
        formula="−λ_D·log σ(βs − δ) if desirable, −λ_U·log σ(−(βs − δ)) if not,  δ = shift",
        source="BCO, arXiv 2404.04656",
        options=_RESPONSES,
        rows="responses",
        needs_shift=True,
        accepts_shift=True,
    ),
    "apo_zero_unpaired": DPOLoss(
        fn=responses.apo_zero_unpaired,
        formula="λ_D·(1 − σ(βs)) if desirable, λ_U·σ(βs) if not",
        source="APO, arXiv 2408.06266 eq. 7, on single responses",
        options=_RESPONSES,
        rows="responses",
    ),
}
"""`loss_type` -> variant. Config choices, error messages, documentation and the test grid are made from this dict."""
