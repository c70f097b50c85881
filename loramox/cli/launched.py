"""Read the config of `accelerate launch`: FSDP and DeepSpeed's ZeRO-3 turn on `--shard`.

A config comes as environment variables, which accelerate reads again when training begins. It would then shard the adapter as
well, but scales and momentum need whole weights. So loramox removes the variable that asks for it, and torch's `fully_shard`
splits the frozen layers, which are the large part.
"""

import os

from loramox.errors import SettingsError

TRAINING = ("unlearn", "train")
SHARDING = (*TRAINING, "evaluate")  # they have --shard; a sweep does as its run did
FSDP, ZERO = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"

# What else a config may say: beside which, in which variable, the values that go with --shard, and the message for others.
BESIDE = [
    (FSDP, "FSDP_SHARDING_STRATEGY", ("full_shard", "1"), "fsdp_sharding_strategy: layers are cut over all processes. Say FULL_SHARD"),
    (FSDP, "FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard"),
     "fsdp_reshard_after_forward: a process has a layer whole only while it computes with it. Say true"),
    (FSDP, "FSDP_OFFLOAD_PARAMS", ("false",), "fsdp_offload_params: layers stay on their GPU. Say false"),
    (FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG", ("false",),
     "use_parallelism_config: processes share rows and layers alone. Say false"),
    (ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE", ("none",), "deepspeed_config_file: it is not read. Say zero_stage: 3 without it"),
    (ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE", ("3",),
     "zero_stage: an adapter has few gradients and optimiser states to cut. Say 3, which cuts weights, or leave DeepSpeed out"),
    (ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), "offload_param_device: layers stay on their GPU. Say none"),
]  # fmt: skip
# The same of what matters in training alone, where loramox has a flag for it.
BESIDE_TRAINING = [
    (FSDP, "FSDP_ACTIVATION_CHECKPOINTING", ("false",),
     "fsdp_activation_checkpointing: say false, and give --activation_checkpointing true to loramox"),
    (ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",),
     "offload_optimizer_device: say none, and give --optim paged_adamw_8bit to loramox"),
    (ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto"),
     "gradient_accumulation_steps: say auto, and give --gradient_accumulation_steps to loramox"),
    (ZERO, "ACCELERATE_GRADIENT_CLIPPING", ("auto", "1", "1.0"),
     "gradient_clipping: say auto, and give --max_grad_norm to loramox"),
]  # fmt: skip
# What accelerate takes where a config does not say; of the others it is what is fine here.
UNSAID = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def as_launched(verb: str) -> list[str]:
    """`--shard true` where the config has FSDP or ZeRO stage 3 and there are several processes; else nothing.

    Raises `SettingsError` for what it has beside them that does not go with `--shard`.
    """
    asked = [each for each in (FSDP, ZERO) if os.environ.get(each) == "true"]
    if not asked or verb not in (*SHARDING, "sweep"):
        return []
    for beside, name, fine, said in BESIDE + (BESIDE_TRAINING if verb in TRAINING else []):
        value = os.environ.get(name, UNSAID.get(name, fine[0]))
        if beside in asked and value.lower() not in fine:
            raise SettingsError(f"accelerate's config has {value} for {said}")
    from loramox.model.config import several_processes

    for each in asked:
        del os.environ[each]
    return ["--shard", "true"] if verb in SHARDING and several_processes() else []
