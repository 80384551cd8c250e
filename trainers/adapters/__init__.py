"""Adapters: LoRA and its kin through peft, beside frozen layers that may be kept in 4 bits."""
