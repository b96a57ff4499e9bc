"""VLLMSampler against a stand-in that keeps to what vLLM documents; vLLM itself is not needed, and was never run."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.rollouts import SamplingOptions, VLLMSampler, sampler_gap, score_completions

COLDEST = 0.01


@dataclass
class SamplingParams:
    """The fields and defaults of vllm.SamplingParams that matter here; an unknown one fails."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self):
        self.temperature = max(self.temperature, COLDEST)


@dataclass
class RunningModel:
    """vLLM's own model: takes weights under the checkpoint's names, one by one."""

    model: torch.nn.Module

    def load_weights(self, weights):
        known = dict(self.model.named_parameters())
        loaded = set()
        for name, tensor in weights:
            with torch.no_grad():
                known[name].copy_(tensor)  # a KeyError for a name that vLLM would not know
            loaded.add(name)
        assert loaded == set(known)
        return loaded


@dataclass
class LLM:
    """vllm.LLM: seeds of its requests, stop reasons, log-probs as a dict a token, its engine's parts."""

    model: Any
    logprobs_mode: str = "raw_logprobs"
    eos: int = 2
    max_model_len: int = 64
    workers: int = 1
    backend: str = "uni"
    quantization: str | None = None
    in_process: bool = True
    calls: list[tuple[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.running = RunningModel(self.model)
        parallel = SimpleNamespace(world_size=self.workers, distributed_executor_backend=self.backend)
        config = SimpleNamespace(
            logprobs_mode=self.logprobs_mode, max_model_len=self.max_model_len, quantization=self.quantization
        )
        self.llm_engine = SimpleNamespace(model_config=config, vllm_config=SimpleNamespace(parallel_config=parallel))
        if self.in_process:
            self.llm_engine.model_executor = object()

    def generate(self, prompts, *, sampling_params, use_tqdm):
        assert use_tqdm is False
        self.calls.append(("generate", sampling_params))
        return [
            SimpleNamespace(
                outputs=[self.sample(prompt["prompt_token_ids"], params, k) for k in reversed(range(params.n))]
            )
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def sample(self, prompt, params, index):
        generator = torch.Generator().manual_seed(params.seed + index)
        torch.rand(1), random.random(), np.random.rand()  # an engine in this process may draw from any state
        stops, ids, logprobs = {self.eos, *params.stop_token_ids}, [], []
        while len(ids) < params.max_tokens:
            with torch.no_grad():
                raw = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
            scores = raw / params.temperature
            if len(ids) < params.min_tokens:
                scores[list(stops)] = -torch.inf
            if params.top_k:
                scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
            ids.append(int(torch.multinomial(scores.softmax(0), 1, generator=generator)))
            shown = scores if self.logprobs_mode == "processed_logprobs" else raw
            logprobs.append({ids[-1]: SimpleNamespace(logprob=float(shown.log_softmax(0)[ids[-1]]))})
            if ids[-1] in stops:
                reason = None if ids[-1] == self.eos else ids[-1]
                return SimpleNamespace(
                    index=index, token_ids=ids, logprobs=logprobs, finish_reason="stop", stop_reason=reason
                )
        return SimpleNamespace(index=index, token_ids=ids, logprobs=logprobs, finish_reason="length", stop_reason=None)

    def apply_model(self, func):
        self.calls.append(("apply_model", None))
        return [func(self.running)]

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache", None))


@pytest.fixture
def vllm(monkeypatch, tiny_model):
    stand_in = ModuleType("vllm")

    def launch(model, **arguments):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # as vLLM does
        return LLM(tiny_model(seed=5), arguments.pop("logprobs_mode"), arguments={"model": model, **arguments})

    stand_in.LLM, stand_in.SamplingParams = launch, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", stand_in)


def options(**changes):
    return SamplingOptions(**{"max_new_tokens": 10, **changes})


def engine(model, **changes):
    return LLM(model, **{"logprobs_mode": "processed_logprobs", **changes})


SETTINGS = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_new_tokens": 2, "stop_token_ids": (7, 8)}


def test_every_option_arrives(vllm, tiny_model):
    llm = engine(tiny_model())
    VLLMSampler(llm, (0, [9]), options(**SETTINGS)).generate([[5], [6, 7]], num_samples=3, seed=1)
    ((_, (one, other)),) = llm.calls
    assert one.seed != other.seed
    expected = SamplingParams(
        n=3, temperature=0.7, top_k=20, top_p=0.9, min_tokens=2, stop_token_ids=[7, 8, 9], max_tokens=10, logprobs=0,
        detokenize=False, seed=one.seed,
    )  # fmt: skip
    assert one == expected
    pure = engine(tiny_model())
    VLLMSampler(pure, (0, []), options()).generate([[5]], seed=1)
    ((_, (params,)),) = pure.calls
    assert (params.temperature, params.top_k, params.top_p, params.min_tokens, params.n) == (1.0, 0, 1.0, 0, 1)


def test_completions_are_prompt_major(vllm, tiny_model, make_prompts, check_logps):
    model, prompts = tiny_model(scale=0.1), make_prompts(7)
    sampler = VLLMSampler(engine(model), (0, [5]), options(temperature=0.8))
    state, python, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    completions = sampler.generate(prompts, num_samples=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    check_logps(model, prompts, completions, num_samples=3, temperature=0.8)
    for completion in completions:
        assert completion.finished == (completion.ids[-1] in (2, 5))
        assert completion.finished or len(completion.ids) == 10
    assert {completion.finished for completion in completions} == {True, False}
    gap = sampler_gap(
        completions, [row.logps for row in score_completions(model, prompts, completions, temperature=0.8)]
    )
    assert gap["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_seed_and_a_place_decide(vllm, tiny_model):
    sampler = VLLMSampler(engine(tiny_model(scale=0.05)), (0, []), options())
    prompts = [[5, 6]] * 4  # equal prompts get completions of their own
    one, same, other = (
        [completion.ids for completion in sampler.generate(prompts, num_samples=2, seed=seed)] for seed in (3, 3, -4)
    )
    assert one == same
    assert not {tuple(ids) for ids in one} & {tuple(ids) for ids in other}
    assert len({tuple(ids) for ids in one}) == 8
    assert [completion.ids for completion in sampler.generate(prompts[:2], num_samples=2, seed=3)] == one[:4]
    assert sampler.generate([], seed=1) == []


def test_the_engine_gets_the_policys_weights(vllm, tiny_model, make_prompts, check_logps):
    llm, policy, prompts = engine(tiny_model(seed=5)), tiny_model(), make_prompts(5)
    sampler = VLLMSampler(llm, (0, []), options())
    sampler.sync(policy)
    assert [name for name, _ in llm.calls] == ["apply_model", "reset_prefix_cache"]
    check_logps(policy, prompts, sampler.generate(prompts, seed=1))
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(tiny_model(), config).eval()
    sampler.sync(adapted)
    check_logps(adapted, prompts, sampler.generate(prompts, seed=1))


def test_an_engine_for_a_policy(vllm, tiny_model, make_prompts, check_logps, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state, python = torch.get_rng_state(), random.getstate()
    sampler = VLLMSampler.for_policy(policy, (0, []), options(temperature=0.5), max_model_len=48)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert sampler.llm.arguments == {"model": str(tmp_path), "gpu_memory_utilization": 0.3, "max_model_len": 48}
    prompts = make_prompts(4)
    check_logps(policy, prompts, sampler.generate(prompts, seed=1), temperature=0.5)
    with pytest.raises(ValueError, match="the policy was not loaded from a checkpoint"):
        VLLMSampler.for_policy(tiny_model(), (0, []), options())


def test_logps_before_the_temperature_are_refused(vllm, tiny_model):
    raw = engine(tiny_model(), logprobs_mode="raw_logprobs")
    VLLMSampler(raw, (0, []), options())  # at temperature 1 the two are one
    for changes in ({"temperature": 0.9}, {"top_k": 3}, {"top_p": 0.9}, {"min_new_tokens": 1}):
        with pytest.raises(ValueError, match=r"logprobs_mode='raw_logprobs'.*create it with logprobs_mode="):
            VLLMSampler(raw, (0, []), options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_process": False}, "runs in a process of its own.*VLLM_ENABLE_V1_MULTIPROCESSING=0"),
        ({"workers": 2, "backend": "mp"}, r"has 2 workers \(distributed_executor_backend='mp'\)"),
        ({"quantization": "fp8"}, r"the vLLM engine is quantised \(fp8\)"),
    ],
)
def test_engines_out_of_reach(vllm, tiny_model, changes, message):
    llm = engine(tiny_model(), **changes)
    with pytest.raises(ValueError, match=message):
        VLLMSampler(llm, (0, []), options()).sync(tiny_model())
    assert not llm.calls


def test_what_vllm_cannot_do_is_refused(vllm, tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"at temperatures of at least 0.01, got temperature=0.001"):
        VLLMSampler(engine(tiny_model()), (0, []), options(temperature=0.001))
    sampler = VLLMSampler(engine(tiny_model(), max_model_len=12), (0, []), options())
    assert len(sampler.generate([[5, 6]], seed=1)) == 1
    with pytest.raises(ValueError, match="prompt 1: 3 tokens and max_new_tokens=10 are more than the engine's max_mod"):
        sampler.generate([[5, 6], [5, 6, 7]], seed=1)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate([[]], seed=1)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="sampling with vLLM needs vllm, which cannot be imported"):
        VLLMSampler(engine(tiny_model()), (0, []), options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort"}, "vLLM gave up prompt 0: finish_reason='abort'"),
        ({"token_ids": [5]}, "prompt 0: vLLM gave 1 tokens and 2 log-probs"),
        ({"finish_reason": "stop", "stop_reason": 9}, "prompt 0: vLLM left out the stop token 9"),
    ],
)
def test_answers_that_are_not_as_documented(vllm, tiny_model, monkeypatch, changes, message):
    llm = engine(tiny_model())
    step = {5: SimpleNamespace(logprob=-1.0)}
    answer = {"index": 0, "token_ids": [5, 5], "logprobs": [step] * 2, "finish_reason": "length", "stop_reason": None}
    monkeypatch.setattr(llm, "sample", lambda *arguments: SimpleNamespace(**{**answer, **changes}))
    with pytest.raises(RuntimeError, match=message):
        VLLMSampler(llm, (0, []), options()).generate([[5]], seed=1)
