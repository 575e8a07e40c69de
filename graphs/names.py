"""The architectures, by Hugging Face's ``model_type``; nothing here needs PyTorch."""

from difflib import get_close_matches

# Each has a file of its name in this folder.
FAMILIES = (
    "bamba",
    "flex_olmo",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "jetmoe",
    "mamba2",
    "mixtral",
    "olmo2",
    "olmoe",
    "qwen3_moe",
)

# The released checkpoint on the hub that is meant where the name alone is given.
RELEASED = {
    "bamba": "ibm-ai-platform/Bamba-9B-v2",
    "flex_olmo": "allenai/FlexOlmo-7x7B-1T",
    "granite": "ibm-granite/granite-3.3-2b-instruct",
    "granitemoe": "ibm-granite/granite-3.1-3b-a800m-instruct",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-tiny",
    "granitemoeshared": "ibm-research/moe-7b-1b-active-shared-experts",
    "jetmoe": "jetmoe/jetmoe-8b",
    "mamba2": "AntonV/mamba2-2.7b-hf",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "olmo2": "allenai/OLMo-2-1124-7B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B",
}

# Model types that one of them computes, with another reading of config.json.
ALIASES = {"llama": "granite"}

# Model types that people ask for: the nearest that is there, and what they have that it has not.
RELATIVES = {
    "falcon_mamba": ("mamba2", "Mamba1 layers, with another scan"),
    "gemma": ("llama", "an embedding scale and norms of its own"),
    "mamba": ("mamba2", "Mamba1 layers, with another scan"),
    "ministral": ("llama", "attention over a sliding window"),
    "mistral": ("llama", "attention over a sliding window"),
    "nemotron_h": ("granitemoehybrid", "layers that are an MLP or experts alone"),
    "olmo": ("olmoe", "norms without weights, and no experts"),
    "olmo3": ("olmo2", "attention over a sliding window in most layers"),
    "phi3": ("llama", "one matrix for queries, keys and values, and one for gate and up"),
    "qwen2": ("llama", "a bias of queries, keys and values alone"),
    "qwen2_moe": ("qwen3_moe", "a shared expert with a gate"),
    "qwen3": ("llama", "a norm of every head's queries and keys"),
    "zamba2": ("bamba", "attention layers and MLPs that are shared among its Mamba2 layers"),
}


def nearest(given: str, known: tuple[str, ...]) -> str | None:
    """The name that somebody who wrote another one may have meant."""
    same = {name.lower(): name for name in known}
    found = get_close_matches(given[:80].lower().replace("-", ""), same, n=1)
    return same[found[0]] if found else None


def nearest_relative(model_type: str) -> str:
    """What messages add of a ``model_type`` that is not there: the nearest one, or nothing."""
    if model_type in RELATIVES:
        relative, has = RELATIVES[model_type]
        return f" The nearest is {relative}, but {model_type} has {has}."
    name = nearest(model_type, (*FAMILIES, *ALIASES))
    return f" The nearest name is {name}." if name else ""
