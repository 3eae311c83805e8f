"""The frozen NF4 base, its adapters, attention and activation policy."""
