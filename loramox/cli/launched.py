"""What a config of `accelerate launch` asks for: FSDP and DeepSpeed's ZeRO-3 cut layers over the processes, as `--shard` does.

A config comes as environment variables, which accelerate reads again when training begins. It would then cut the adapter as
well, whose strengths and momentum are set on whole weights. So the variable that asks for it is taken away, and the frozen
layers, which are what is large, are cut by torch's `fully_shard`.
"""

import os

from loramox.errors import SettingsError

SHARDING = ("unlearn", "memorize", "evaluate")  # they have --shard
FOLLOWING = ("sweep",)  # does as its run did

# What else a config may say, by the variable that asks for the cut: the values that go with --shard, and what to say of others.
BESIDE = {
    "ACCELERATE_USE_FSDP": {
        "FSDP_SHARDING_STRATEGY": (
            ("full_shard", "1"),
            "fsdp_sharding_strategy: layers are cut over all processes. Say FULL_SHARD",
        ),
        "FSDP_RESHARD_AFTER_FORWARD": (
            ("true", "full_shard"),
            "fsdp_reshard_after_forward: a process has a layer whole only while it computes with it. Say true",
        ),
        "FSDP_OFFLOAD_PARAMS": (("false",), "fsdp_offload_params: layers stay on their GPU. Say false"),
        "FSDP_ACTIVATION_CHECKPOINTING": (
            ("false",),
            "fsdp_activation_checkpointing: say false, and give --activation_checkpointing true to loramox",
        ),
    },
    "ACCELERATE_USE_DEEPSPEED": {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": (
            ("none",),
            "deepspeed_config_file: it is not read. Say zero_stage: 3 without it",
        ),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": (
            ("3",),
            "zero_stage: an adapter has few gradients and optimiser states to cut. Say 3, which cuts weights, or leave DeepSpeed out",
        ),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
            ("none",),
            "offload_param_device: layers stay on their GPU. Say none",
        ),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
            ("none",),
            "offload_optimizer_device: say none, and give --optim paged_adamw_8bit to loramox",
        ),
    },
}
# What accelerate takes where a config does not say; of the others it is what is fine here.
UNSAID = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def as_launched(verb: str, words: list[str]) -> list[str]:
    """The words of a verb, with `--shard true` where the config has FSDP or ZeRO stage 3 and no flag says otherwise.

    Raises `SettingsError` for what it has beside them that does not go with `--shard`.
    """
    for asks, beside in BESIDE.items():
        if os.environ.get(asks) != "true" or verb not in (*SHARDING, *FOLLOWING):
            continue
        for name, (fine, said) in beside.items():
            value = os.environ.get(name, UNSAID.get(name, fine[0]))
            if value.lower() not in fine:
                raise SettingsError(f"accelerate's config has {value} for {said}")
        del os.environ[asks]
        if verb in SHARDING and not any(word.partition("=")[0] == "--shard" for word in words):
            words = [*words, "--shard", "true"]
    return words
