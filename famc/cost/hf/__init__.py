"""A Hugging Face `config.json` as an Anatomy.

`config` tells the architectures apart; `decoders`, `encoders`, `vision` and `media` (what joins a tower to a language model) build them
out of `text`'s blocks; `read` gives a config's values, or its class's defaults (data/hf_defaults.json).
"""
