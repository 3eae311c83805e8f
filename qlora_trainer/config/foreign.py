"""What axolotl, LLaMA-Factory, transformers, TRL and PEFT call the things that this config calls otherwise.

Only used to answer an unknown key with "did you mean".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Counterpart:
    """Our answer to a foreign key.

    Attributes:
        keys: our dotted keys that do this job, the first one first; empty where nothing needs to be set.
        note: what differs, a clause without a full stop; empty when only the name does.
    """

    keys: tuple[str, ...]
    note: str = ""


_BATCH_NOTE = "it counts documents per optimizer step and is cut into micro-batches for you"
_LOADED_BY_US = "the base is always quantized to NF4"
_STEPS_OF_EPOCHS = "counted in optimizer steps"

_NAMES_BY_COUNTERPART: tuple[tuple[Counterpart, str], ...] = (
    (Counterpart(("model.base",)), "base_model model_name_or_path model_name model_id pretrained_model_name_or_path"),
    (Counterpart(("model.revision",)), "base_model_revision model_revision"),
    (
        Counterpart((), "the tokenizer of model.base is used"),
        "tokenizer tokenizer_config tokenizer_type tokenizer_name tokenizer_name_or_path",
    ),
    (Counterpart(("data.chat_template",), "it is a Jinja file"), "template chat_template_jinja chat_template_path"),
    (
        Counterpart((), "remote code is never run"),
        "trust_remote_code trust_remote_code_model tokenizer_trust_remote_code",
    ),
    (
        Counterpart((), _LOADED_BY_US),
        "load_in_4bit quantization_bit quantization_method bnb_4bit_quant_type quant_type adapter finetuning_type "
        "use_peft bnb_4bit_quant_storage qlora",
    ),
    (Counterpart((), f"8-bit bases are not offered: {_LOADED_BY_US}"), "load_in_8bit bits"),
    (
        Counterpart(("quantization.double_quant",)),
        "bnb_4bit_use_double_quant double_quantization use_double_quant use_nested_quant",
    ),
    (
        Counterpart(("quantization.compute_dtype",)),
        "bnb_4bit_compute_dtype bf16 fp16 torch_dtype pure_bf16 compute_type infer_dtype",
    ),
    (Counterpart(("lora.rank",)), "lora_r lora_rank r"),
    (Counterpart(("lora.alpha",)), "lora_alpha"),
    (Counterpart(("lora.dropout",)), "lora_dropout"),
    (Counterpart(("lora.use_rslora",)), "rslora use_rank_stabilized_lora peft_use_rslora"),
    (Counterpart(("lora.init_from",)), "lora_model_dir adapter_name_or_path peft_model resume_adapter adapters"),
    (Counterpart(("lora.use_dora",)), "dora peft_use_dora"),
    (Counterpart(("lora.layers_to_transform",)), "peft_layers_to_transform lora_layers_to_transform"),
    (
        Counterpart(("lora.target_modules",)),
        "lora_target lora_target_modules lora_target_linear peft_target_modules target_linear",
    ),
    (Counterpart(("data.train",)), "datasets dataset dataset_name train_file dataset_path dataset_dir data_path"),
    (
        Counterpart(("data.train", "data.eval"), "as owner/name/subset:split"),
        "dataset_split train_split split dataset_config dataset_config_name subset",
    ),
    (Counterpart(("data.revision",)), "dataset_revision"),
    (Counterpart(("data.eval",)), "test_datasets eval_dataset validation_file eval_file"),
    (Counterpart(("data.eval_fraction",)), "val_set_size eval_split test_size validation_split_percentage val_size"),
    (
        Counterpart(("data.seq_len",)),
        "cutoff_len sequence_len max_seq_length max_seq_len max_length block_size model_max_length",
    ),
    (Counterpart(("data.packing",)), "sample_packing eval_sample_packing pad_to_sequence_len neat_packing"),
    (Counterpart(("training.epochs",)), "num_epochs num_train_epochs n_epochs"),
    (Counterpart(("training.max_steps",)), "num_steps num_training_steps max_train_steps total_steps"),
    (
        Counterpart(("training.global_batch_size",), _BATCH_NOTE),
        "gradient_accumulation_steps train_batch_size batch_size effective_batch_size",
    ),
    (
        Counterpart(("training.global_batch_size", "memory.micro_batch_tokens"), _BATCH_NOTE),
        "per_device_train_batch_size micro_batch_size per_gpu_train_batch_size",
    ),
    (
        Counterpart(("memory.micro_batch_tokens",), "evaluation uses the micro-batches of training"),
        "per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size",
    ),
    (Counterpart(("training.learning_rate",)), "lr"),
    (Counterpart(("training.loraplus_lr_ratio",)), "loraplus_ratio lora_plus_ratio lorap_lr_ratio lora_plus_lr_ratio"),
    (
        Counterpart(("lora.modules_to_save",), "it takes the embedding, the head and norms, no other module"),
        "lora_modules_to_save additional_target unfreeze_lm_head unfrozen_parameters",
    ),
    (Counterpart(("lora.bias",)), "lora_bias_trainable peft_bias"),
    (
        Counterpart(("lora.alora_invocation_tokens",), "it takes numbers of tokens"),
        "use_alora activated_lora invocation_string invocation_tokens alora_invocation_string",
    ),
    (Counterpart(("training.schedule",)), "lr_scheduler lr_scheduler_type scheduler lr_schedule"),
    (
        Counterpart(("training.warmup_ratio",), "it is a share of all steps, 0 to 1"),
        "warmup_steps num_warmup_steps lr_warmup_steps warmup",
    ),
    (Counterpart(("training.optimizer",)), "optim optimiser"),
    (Counterpart(("training.max_grad_norm",)), "gradient_clipping clip_grad_norm max_norm"),
    (Counterpart(("training.weight_decay",)), "wd"),
    (Counterpart(("training.seed",)), "data_seed"),
    (Counterpart(("training.save_every",), _STEPS_OF_EPOCHS), "save_steps saves_per_epoch save_strategy"),
    (
        Counterpart(("training.eval_every",), _STEPS_OF_EPOCHS),
        "eval_steps evals_per_epoch eval_strategy evaluation_strategy do_eval",
    ),
    (Counterpart((), "every step is written to metrics.jsonl"), "logging_steps logging_strategy"),
    (
        Counterpart(("memory.activation_checkpointing",)),
        "gradient_checkpointing gradient_checkpointing_kwargs disable_gradient_checkpointing",
    ),
    (Counterpart(("memory.budget",)), "max_memory gpu_memory_limit"),
    (Counterpart(("memory.host_budget",)), "cpu_memory max_host_memory"),
    (Counterpart(("output.dir",)), "output_dir logging_dir run_dir"),
    (Counterpart((), "a run folder is never written over"), "overwrite_output_dir overwrite_cache"),
    (
        Counterpart((), "resume is an option of the command: qlora-trainer train --resume auto"),
        "resume_from_checkpoint auto_resume_from_checkpoints resume",
    ),
    (
        Counterpart(("output.trackers",)),
        "report_to use_wandb use_mlflow use_tensorboard wandb_project wandb_entity wandb_name mlflow_tracking_uri",
    ),
    (Counterpart(("output.keep_checkpoints",)), "save_total_limit"),
    (
        Counterpart((), "the best checkpoint is always kept beside the last"),
        "load_best_model_at_end metric_for_best_model",
    ),
    (
        Counterpart(("data.train_on",)),
        "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss train_on_responses_only mask_history",
    ),
    (Counterpart(("data.overlong",)), "excess_length_strategy truncation"),
    (Counterpart(("data.columns",)), "field_messages field_instruction field_output message_property_mappings"),
    (Counterpart(("data.format",)), "formatting dataset_format"),
    (Counterpart((), "attention is chosen for you"), "flash_attention flash_attn attn_implementation sdp_attention"),
)

FOREIGN_KEYS: Mapping[str, Counterpart] = MappingProxyType(
    {name: counterpart for counterpart, names in _NAMES_BY_COUNTERPART for name in names.split()}
)
