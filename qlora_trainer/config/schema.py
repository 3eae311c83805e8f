"""Every key of the config, its default, its unit and its limits: frozen values that know nothing about files.

"auto" marks what a later room decides (the planner, the hardware, the data); nothing here measures anything.
Paths are taken relative to the folder the command is started in.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qlora_trainer.config.values import (
    AlphaPattern,
    Auto,
    Budget,
    Columns,
    LayerRanges,
    Layers,
    Names,
    Paths,
    PathText,
    RankPattern,
    TargetModules,
    Tokens,
)


class Section(BaseModel):
    """What all sections share: unknown keys are refused, values are frozen, and `"16"` or `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class ModelSection(Section):
    """The frozen base."""

    base: PathText = Field(
        description="Base model: a local transformers folder with safetensors, a hub id owner/name, "
        "or the shipped alias smollm2-135m.",
    )
    revision: PathText | None = Field(None, description="Branch, tag or commit of a hub id; null = its default branch.")


class QuantizationSection(Section):
    """How the base is stored: always NF4 in blocks of 64."""

    double_quant: bool = Field(
        True, description="Quantize the block scales too: 0.5159 instead of 0.5625 bytes a weight."
    )
    head: Literal["bfloat16", "nf4"] = Field(
        "bfloat16",
        description="How the output head is stored: bfloat16, or nf4 as the linears are, which takes a quarter of the "
        "memory and learns with another head; never chosen unasked.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of activations and matrix products; auto = what this device multiplies fastest."
    )


class LoraSection(Section):
    """The adapters that are trained."""

    rank: Annotated[int, Field(ge=1)] | Literal["max"] = Field(
        16,
        description="Rank of every adapter; max = the largest of 8 to 256 that costs under 5 % of the speed: what is "
        "learned then depends on memory.budget.",
    )
    alpha: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="The update is scaled by alpha / rank; auto = 2 x rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped in training.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Dtype of the adapter weights in the model; the optimizer keeps a float32 master. auto = bfloat16, "
        "and float32 where float16 is computed in.",
    )
    target_modules: TargetModules = Field(
        "all-linear",
        description="Linears with an adapter: all-linear (every one but lm_head), a list of module name endings, "
        "or one regular expression that matches whole module names; [] trains modules_to_save or biases alone.",
    )
    layers_to_transform: Layers | None = Field(
        None, description="Layers whose linears get an adapter, such as [0, 1]; null = all."
    )
    layer_replication: LayerRanges = Field(
        (),
        description="The base's layers that the model consists of, each [first, end], as in PEFT: [[0, 4], [2, 5]] "
        "repeats two of five. Each layer has adapters and memory of its own; [] = the base as it is.",
    )
    use_rslora: bool = Field(
        False, description="Scale the update by alpha / sqrt(rank) in place of alpha / rank (rsLoRA)."
    )
    use_dora: bool = Field(
        False,
        description="Train the length of each row of the adapted weight as well, in float32 (DoRA): about half as much "
        "computation again.",
    )
    rank_pattern: RankPattern = Field(
        (),
        description="Other ranks for some linears, as {name: rank}: the name is a regular expression for the end of a "
        "module's name, and the first that fits decides, as in PEFT.",
    )
    alpha_pattern: AlphaPattern = Field(
        (),
        description="Other alphas for some linears, like rank_pattern; a linear's update is scaled by its own alpha "
        "and its own rank.",
    )

    modules_to_save: Names = Field(
        (),
        description="Tables over the vocabulary that are trained whole, such as [embed_tokens, lm_head]: a copy each, "
        "with a gradient and an optimizer state; both where the base ties them, which is then one. Norms, too, by the "
        "ends of their names, such as [input_layernorm, model.norm], in float32.",
    )
    untie_tables: bool = Field(
        False,
        description="Train embedding and head of a base that ties them as two tables, or one of them alone, as PEFT "
        "does without ensure_weight_tying; the exported adapter, and what is merged, has two tables.",
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        "none",
        description="Biases of the base that are trained as well, in float32: those of the linears with an adapter "
        "(lora_only) or every one, of norms and head too (all); Qwen 2's q, k and v have some, Llama and Qwen 3 none.",
    )
    lora_bias: bool = Field(
        False,
        description="Train a bias of each adapter's B as well, in float32, scaled as B is; the linear needs none "
        "of its own. Not with use_dora. PEFT computes it, other readers of adapters do not.",
    )
    alora_invocation_tokens: Tokens = Field(
        (),
        description="Numbers of the tokens that LoRA works from (Activated LoRA, as in PEFT): from the last place in a "
        "document where they stand in a row; biases, norms and tables that are trained work everywhere. [] = always.",
    )
    init_from: PathText | None = Field(
        None,
        description="Adapter whose weights to begin with: a finished run, a PEFT adapter folder or a hub id "
        "owner/name[@revision]; its rank, alpha, target_modules and so on are taken where they are not set here; "
        "null = a new adapter.",
    )

    def alpha_for(self, rank: int) -> float:
        """`alpha` as a number, for the rank that was decided."""
        return 2.0 * rank if self.alpha == "auto" else self.alpha


class DataSection(Section):
    """What is learned."""

    train: Paths = Field(
        description="Training data: a JSON Lines, JSON, CSV or Parquet file (.gz too, but for Parquet), a pattern such "
        "as data/*.jsonl, a folder of datasets' save_to_disk (FOLDER:SPLIT of a DatasetDict), a hub id "
        "owner/name[/subset][:split], or a list of those."
    )
    eval: Paths | None = Field(
        None, description="Held-out data, named like train; null = hold out eval_fraction of train."
    )
    revision: PathText | None = Field(
        None, description="Branch, tag or commit of the hub ids in train and eval; null = their default branch."
    )
    format: Literal["messages", "sharegpt", "prompt_completion", "question_answer", "alpaca", "text"] | None = Field(
        None, description="Form of the rows; null = told by the keys of each file's first row, and shown."
    )
    columns: Columns | None = Field(
        None,
        description="Columns to read, as {our key: their column}, such as {prompt: query, completion: reply}; all "
        "others are passed over; null = all, under their own names.",
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of the rows of train held out when eval is null; 0 = no evaluation."
    )
    chat_template: PathText | None = Field(
        None,
        description="Jinja file that says how conversations are written, in place of the tokenizer's own template; it "
        "is kept beside the adapter.",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant",
        description="What is learned of a conversation: the assistant's turns and the stop tokens after them, the last "
        "of its turns only, or every token. A plain text is learned whole.",
    )
    seq_len: Annotated[int, Field(ge=8)] | Auto = Field(
        "auto",
        description="Longest document kept, in tokens; auto = holds 99 % of the documents uncut, or all where overlong "
        "is error or max_dropped_share below 0.01.",
    )
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        "drop",
        description="A document longer than seq_len: drop and count it, truncate it to its first tokens, split it into "
        "documents, or stop with an error.",
    )
    max_dropped_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the rows that may be left out as bad, too long or without a token to learn.",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="A line that is no conversation: stop at the first, or skip, count and list them."
    )
    streaming: bool = Field(
        False,
        description="Read train while it is trained on, a hub id from the network, in place of tokenising all of it "
        "first; needs training.max_steps, and data.eval or eval_fraction: 0.",
    )
    stream_rows: int = Field(
        10_000,
        ge=1,
        description="Rows that are read and shuffled at a time when streaming is true; up to 255 more.",
    )
    packing: bool = Field(True, description="Lay whole documents end to end without padding, isolated from each other.")


class TrainingSection(Section):
    """How it is learned."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training documents.")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after this many optimizer steps; null = epochs decides."
    )
    global_batch_size: int = Field(
        16,
        ge=1,
        description="Documents per optimizer step; memory does not depend on it, see memory.micro_batch_tokens.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the B matrices (as in PEFT also of DoRA's magnitudes, trained biases and norms) "
        "over learning_rate, which the A matrices keep (LoRA+); 1 = one rate for all.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: cosine or linear fall to 0, or constant."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of all steps in which the learning rate rises.")
    optimizer: Literal["auto", "adamw_32bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "auto",
        description="AdamW with moments of 32 or 8 bits, resident or paged: one of auto, adamw_32bit, "
        "adamw_8bit, paged_adamw_32bit, paged_adamw_8bit; auto = 32 bits, paged on a GPU.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay of AdamW; trained biases (also a trained head's) and norms have none.",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Gradients are scaled down to this norm; null = never."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of order, dropout and initialisation.")
    save_every: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="Optimizer steps between checkpoints.")
    eval_every: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="Optimizer steps between evaluations.")
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after this many evaluations in a row without a lower loss; null = never."
    )


class MemorySection(Section):
    """What the run may use and trade for it. It changes what is learned only through `lora.rank: max`."""

    budget: Budget = Field(
        "auto", description='Memory of the device for the whole run, such as "8GiB"; auto = what is free.'
    )
    host_budget: Budget = Field(
        "auto", description='Memory of the host for the whole run, such as "16GiB"; auto = what is free.'
    )
    micro_batch_tokens: Annotated[int, Field(ge=8)] | Auto = Field(
        "auto", description="Tokens in one forward and backward pass; at least data.seq_len."
    )
    activation_checkpointing: bool | Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="Recompute every layer in the backward pass instead of keeping its activations (true), none "
        "(false), or this many, the first ones.",
    )
    loss_chunk_tokens: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Positions whose logits exist at the same time."
    )
    activation_offload: bool | Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="Keep the input of every recomputed layer in host memory, on a CPU in a file (true), of none "
        "(false), or of this many, the first ones.",
    )
    tile_tokens: Annotated[int, Field(ge=8)] | Literal[0] | Auto = Field(
        "auto", description="Tokens that MLP and projections of a recomputed layer take at a time; 0 = all at once."
    )
    embedding_residency: Literal["auto", "device", "host"] = Field(
        "auto", description="Where embedding and head live: one of auto, device, host."
    )
    optimizer_residency: Literal["auto", "device", "paged", "host"] = Field(
        "auto",
        description="Where the optimizer's state lives: one of auto, device, paged, host; auto = as training.optimizer "
        "says, and on the host where nothing else fits.",
    )
    base_residency: Literal["auto", "device", "streamed"] = Field(
        "auto",
        description="Where the packed layers live: one of auto, device, streamed; streamed = on the host, on a CPU in "
        "the mapped NF4 cache, two layers on the device at a time.",
    )
    paging_dir: PathText | None = Field(
        None, description="Folder on a disk for the file of a paged optimizer on CPU; null = the run folder."
    )


class OutputSection(Section):
    """Where it goes."""

    dir: PathText = Field("runs/default", description="Run folder: config, metrics, checkpoints and the adapter.")
    trackers: Names = Field((), description="Experiment trackers fed through accelerate, such as [tensorboard].")
    keep_checkpoints: int = Field(3, ge=2, description="Checkpoints kept besides the best and the last.")
    sample_questions: int = Field(
        3, ge=0, le=20, description="Held-out questions answered before and after the training."
    )


class RunConfig(Section):
    """Everything a run was asked for."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        tokens, seq_len = self.memory.micro_batch_tokens, self.data.seq_len
        if tokens != "auto" and seq_len != "auto" and tokens < seq_len:
            raise _disagreement("memory.micro_batch_tokens", tokens, f"at least data.seq_len = {seq_len}")
        if self.data.streaming:
            _require_streamable(self.data, self.training)
        _require_trainable(self.lora)
        _require_one_residency(self.training.optimizer, self.memory.optimizer_residency)
        patience = self.training.early_stopping_patience
        if patience is not None and self.data.eval is None and self.data.eval_fraction == 0:
            raise _disagreement(
                "training.early_stopping_patience",
                patience,
                "null, or a data.eval or data.eval_fraction to evaluate on",
            )
        return self


def _require_trainable(lora: LoraSection) -> None:
    if lora.use_dora and lora.lora_bias:
        raise _disagreement(
            "lora.lora_bias", True, "false beside lora.use_dora, as in PEFT, which does not define both"
        )
    if lora.lora_bias and not (lora.target_modules or lora.init_from):
        raise _disagreement("lora.lora_bias", True, "false without lora.target_modules: only a B has such a bias")
    if lora.alora_invocation_tokens and (lora.use_dora or lora.lora_bias):
        expected = "[] beside lora.use_dora or lora.lora_bias: what they add is added at every token"
        raise _disagreement("lora.alora_invocation_tokens", list(lora.alora_invocation_tokens), expected)
    if lora.alora_invocation_tokens and not (lora.target_modules or lora.init_from):
        expected = "[] without lora.target_modules: what else is trained works at every token"
        raise _disagreement("lora.alora_invocation_tokens", list(lora.alora_invocation_tokens), expected)
    if lora.layer_replication and lora.bias != "none":
        raise _disagreement("lora.bias", lora.bias, "none beside lora.layer_replication: copies share them in PEFT")
    # What an adapter to begin with has, its folder says.
    if not (lora.target_modules or lora.modules_to_save or lora.bias == "all" or lora.init_from):
        expected = "some linears, unless lora.modules_to_save or lora.bias: all name what is trained without LoRA"
        raise _disagreement("lora.target_modules", list(lora.target_modules), expected)


def _require_one_residency(optimizer: str, residency: str) -> None:
    """The name of a pinned optimizer says whether it is paged; a residency that is pinned, too, must mean the same."""
    named = "auto" if optimizer == "auto" else "paged" if optimizer.startswith("paged") else "device"
    if "auto" in (named, residency) or residency in (named, "host" if named == "device" else named):
        return
    expected = f"auto or {named}, which training.optimizer = {optimizer} means"
    raise _disagreement("memory.optimizer_residency", residency, expected)


def _require_streamable(data: DataSection, training: TrainingSection) -> None:
    if training.max_steps is None:
        expected = "a number of steps, since data.streaming knows no end of the data"
        raise _disagreement("training.max_steps", None, expected)
    if data.stream_rows < training.global_batch_size:
        expected = f"at least training.global_batch_size = {training.global_batch_size}"
        raise _disagreement("data.stream_rows", data.stream_rows, expected)
    if data.eval is None and data.eval_fraction > 0:
        expected = "0, or a data.eval: nothing can be held out of a stream (data.streaming)"
        raise _disagreement("data.eval_fraction", data.eval_fraction, expected)


def _disagreement(key: str, found: object, expected: str) -> PydanticCustomError:
    """A broken rule between two keys; `config.load` reads the parts back to name the line of `key`."""
    return PydanticCustomError("disagreement", "{expected}", {"key": key, "found": found, "expected": expected})
