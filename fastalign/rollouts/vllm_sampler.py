"""Sampling with vLLM, in the trainer's own process."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastalign.models.head import base_causal_lm
from fastalign.rollouts.transformers_sampler import special_ids
from fastalign.rollouts.types import Completion, SamplingOptions, check_prompts
from fastalign.rollouts.weights import checkpoint_weights

_COLDEST = 0.01  # vLLM raises a lower temperature to this one


class VLLMSampler:
    """Completions from a vLLM engine, which gets the policy's weights at every `sync`.

    llm: a `vllm.LLM` of the policy's checkpoint, its engine in this process:

        VLLM_ENABLE_V1_MULTIPROCESSING=0                        # in the environment
        llm = vllm.LLM(model, logprobs_mode="processed_logprobs", gpu_memory_utilization=0.3)

        or, under torchrun, with distributed_executor_backend="external_launcher" for tensor parallelism; `for_policy`
        makes one. vLLM's log-probs are by default those *before* temperature, top-k and top-p: "processed_logprobs" are
        those of what is sampled.
    tokenizer, options: as for TransformersSampler. vLLM itself adds the eos ids of its tokenizer and of the
        checkpoint's generation_config to the stop ids; the sampling settings there are not used.

    Each request has a seed of its own, drawn from `seed` and its place: completions do not depend on how vLLM batches
    requests, beyond its rounding.

    Written after vLLM's documentation and source, and tested against a stand-in: it has not been run with vLLM itself.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase | tuple[int | None, Iterable[int]],
        options: SamplingOptions,
    ) -> None:
        """Raises ValueError: vLLM is not installed, log-probs that are not those of what is sampled, a temperature that
        vLLM would change."""
        self._sampling_params = _vllm().SamplingParams
        self.llm, self.options = llm, options
        self._stop_ids = sorted({*special_ids(tokenizer)[1], *options.stop_token_ids})
        self._model_config = llm.llm_engine.model_config
        mode = getattr(self._model_config, "logprobs_mode", "raw_logprobs")
        mode = getattr(mode, "value", mode)
        if mode != "processed_logprobs" and not (options.is_pure and options.temperature == 1.0):
            raise ValueError(
                f"the engine has logprobs_mode={mode!r}: log-probs without temperature, top_k, top_p and "
                'min_new_tokens; create it with logprobs_mode="processed_logprobs"'
            )
        if options.temperature < _COLDEST:
            raise ValueError(
                f"vLLM samples at temperatures of at least {_COLDEST}, got temperature={options.temperature}"
            )

    @classmethod
    def for_policy(
        cls, policy: nn.Module, tokenizer: PreTrainedTokenizerBase | tuple[int | None, Iterable[int]],
        options: SamplingOptions, *, gpu_memory_utilization: float = 0.3, **engine: Any,
    ) -> VLLMSampler:  # fmt: skip
        """A sampler with an engine of its own, which gets the policy's weights at once.

        policy: a transformers causal LM or a PeftModel around one, loaded from a checkpoint: vLLM reads its files.
        gpu_memory_utilization: vLLM's share of the GPU's memory, its weights included; the trainer needs the rest.
        engine: further arguments of `vllm.LLM`: max_model_len, dtype, tensor_parallel_size, …
        """
        checkpoint = base_causal_lm(policy).name_or_path
        if not checkpoint:
            raise ValueError("the policy was not loaded from a checkpoint, which vLLM reads: save it and load that")
        arguments = {"logprobs_mode": "processed_logprobs", "gpu_memory_utilization": gpu_memory_utilization, **engine}
        with _random_states_kept():
            llm = _vllm().LLM(model=checkpoint, **arguments)
        sampler = cls(llm, tokenizer, options)
        sampler.sync(policy)
        return sampler

    def generate(self, prompts: Sequence[Sequence[int]], *, num_samples: int = 1, seed: int) -> list[Completion]:
        """num_samples completions of each prompt, prompt-major.

        Raises ValueError: an empty prompt, one that leaves max_new_tokens no room in max_model_len. RuntimeError: vLLM
        gave up a request, or answered otherwise than documented.
        """
        checked = check_prompts(prompts, num_samples)
        if not checked:
            return []
        for position, prompt in enumerate(checked):
            if len(prompt) + self.options.max_new_tokens > self._model_config.max_model_len:
                raise ValueError(
                    f"prompt {position}: {len(prompt)} tokens and max_new_tokens={self.options.max_new_tokens} are "
                    f"more than the engine's max_model_len={self._model_config.max_model_len}"
                )
        # vLLM seeds sample k of a request with seed + k
        seeds = np.random.default_rng([seed % 2**64, 0x766C6C6D]).integers(2**48, size=len(checked)).tolist()
        with _random_states_kept():
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in checked],
                sampling_params=[self._parameters(num_samples, request_seed) for request_seed in seeds],
                use_tqdm=False,
            )
        return [
            self._completion(position, sample)
            for position, output in enumerate(outputs)
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]

    def sync(self, model: nn.Module) -> None:
        """Load the policy's weights into the engine and forget the prefixes that the old ones computed.

        model: as for `checkpoint_weights`: transformers or PEFT, LoRA merged into copies. Under FSDP2 every process
        must call this.
        Raises ValueError if the engine is out of reach: in another process, spread over workers, or quantised.
        """
        engine = self.llm.llm_engine
        if not hasattr(engine, "model_executor"):
            raise ValueError(
                "the vLLM engine runs in a process of its own, where the policy's weights cannot be put: set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment before vllm is imported"
            )
        parallel = engine.vllm_config.parallel_config
        if parallel.world_size > 1 and parallel.distributed_executor_backend != "external_launcher":
            raise ValueError(
                f"the vLLM engine has {parallel.world_size} workers (distributed_executor_backend="
                f"{parallel.distributed_executor_backend!r}), which the policy's weights cannot be put into: start the "
                'trainer with torchrun and create the engine with distributed_executor_backend="external_launcher"'
            )
        if self._model_config.quantization is not None:
            raise ValueError(
                f"the vLLM engine is quantised ({self._model_config.quantization}): it cannot take the policy's weights"
            )
        weights = checkpoint_weights(model)
        self.llm.apply_model(lambda running: _load(running, weights))
        self.llm.reset_prefix_cache()

    def _parameters(self, num_samples: int, seed: int) -> Any:
        return self._sampling_params(
            n=num_samples,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            max_tokens=self.options.max_new_tokens,
            min_tokens=self.options.min_new_tokens,
            stop_token_ids=self._stop_ids,
            logprobs=0,  # of the sampled token alone
            seed=seed,
            detokenize=False,
        )

    def _completion(self, position: int, sample: Any) -> Completion:
        ids, finished = list(sample.token_ids), sample.finish_reason == "stop"
        if not finished and sample.finish_reason != "length":
            raise RuntimeError(f"vLLM gave up prompt {position}: finish_reason={sample.finish_reason!r}")
        if not ids or len(sample.logprobs) != len(ids):
            raise RuntimeError(f"prompt {position}: vLLM gave {len(ids)} tokens and {len(sample.logprobs)} log-probs")
        if isinstance(sample.stop_reason, int) and ids[-1] != sample.stop_reason:
            raise RuntimeError(f"prompt {position}: vLLM left out the stop token {sample.stop_reason}")
        logps = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
        return Completion(ids, finished, np.array(logps, np.float32))


def _load(running: Any, weights: dict[str, Any]) -> None:
    running.load_weights(weights.items())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Python's, numpy's and torch's: an engine in this process seeds all of them when it is made."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(f"sampling with vLLM needs vllm, which cannot be imported: {error}") from error
