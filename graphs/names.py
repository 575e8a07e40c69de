"""The architectures, by Hugging Face's ``model_type``; nothing here needs PyTorch."""

# Each has a file of its name in this folder.
FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
