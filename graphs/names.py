"""The architectures, by Hugging Face's ``model_type``; nothing here needs PyTorch."""

from difflib import get_close_matches

# Each has a file of its name in this folder.
FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")

# The released checkpoint on the hub that is meant where the name alone is given.
RELEASED = {
    "granite": "ibm-granite/granite-3.3-2b-instruct",
    "jetmoe": "jetmoe/jetmoe-8b",
    "mamba2": "AntonV/mamba2-2.7b-hf",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}

# Model types that one of them computes, with another reading of config.json.
ALIASES = {"llama": "granite"}

# Model types that people ask for: the nearest that is there, and what they have that it has not.
RELATIVES = {
    "bamba": ("mamba2", "attention layers and MLPs among its Mamba2 layers"),
    "falcon_mamba": ("mamba2", "Mamba1 layers, with another scan"),
    "flex_olmo": ("olmoe", "its norms behind attention and experts"),
    "gemma": ("llama", "an embedding scale and norms of its own"),
    "granitemoe": ("granite", "a mixture of experts in every layer"),
    "granitemoehybrid": ("granite", "Mamba2 layers and mixtures of experts"),
    "granitemoeshared": ("granite", "a mixture of experts and a shared one in every layer"),
    "mamba": ("mamba2", "Mamba1 layers, with another scan"),
    "ministral": ("llama", "attention over a sliding window"),
    "mistral": ("llama", "attention over a sliding window"),
    "mixtral": ("olmoe", "no norm of its queries and keys"),
    "nemotron_h": ("mamba2", "attention layers and MLPs among its Mamba2 layers"),
    "olmo": ("olmoe", "norms without weights, and no experts"),
    "olmo2": ("olmoe", "no experts, and its norms behind attention and MLP"),
    "olmo3": ("olmoe", "no experts, and attention over a sliding window"),
    "phi3": ("llama", "one matrix for queries, keys and values, and one for gate and up"),
    "qwen2": ("llama", "a bias of queries, keys and values alone"),
    "qwen2_moe": ("olmoe", "a shared expert"),
    "qwen3": ("llama", "a norm of every head's queries and keys"),
    "qwen3_moe": ("olmoe", "a norm of every head's queries and keys"),
    "zamba2": ("mamba2", "attention layers and MLPs that are shared among its Mamba2 layers"),
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
