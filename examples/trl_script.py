"""A DPO script as it is written for TRL, run by fastalign: what differs is where three names are imported from.

    python examples/trl_script.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 1e-6 --output_dir qwen-dpo [--use_peft --lora_r 16] [--config run.yaml]

Needs TRL for its script helpers. With TRL's trainer the first of the import lines would hold all names.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from fastalign import DPOConfig, DPOTrainer
from fastalign.integrations.trl import TrlParser


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
    } | (training_args.model_init_kwargs or {})
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    evaluate = training_args.eval_strategy != "no"
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
