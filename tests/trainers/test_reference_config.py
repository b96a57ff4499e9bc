"""What DPO's and PRO's settings have in common: where the reference is, and where its log-probs."""

import pytest

from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.pro_config import PROConfig
from fastalign.trainers.reference_config import DEFAULT_REF_BATCH_TOKENS, ReferenceConfig


@pytest.mark.parametrize("kind", [DPOConfig, PROConfig])
def test_it_is_said_once(kind, tmp_path):
    given = {"use_cpu": True} | ({"reference_free": False} if kind is PROConfig else {})
    assert issubclass(kind, ReferenceConfig)
    own = set(vars(kind)["__annotations__"])
    assert not own & set(vars(ReferenceConfig)["__annotations__"])
    config = kind(str(tmp_path), ref_model_name_or_path="m", precompute_ref_batch_tokens=64, **given)
    assert (config.ref_model_name_or_path, config.cache_dir, config.precompute_ref_batch_tokens) == ("m", None, 64)
    with pytest.raises(ValueError, match="precompute_ref_batch_tokens=0: it must be positive"):
        kind(str(tmp_path), precompute_ref_batch_tokens=0, **given)
    help = kind.__dataclass_fields__["precompute_ref_batch_tokens"].metadata["help"]
    assert all(str(tokens) in help for tokens in DEFAULT_REF_BATCH_TOKENS.values())
