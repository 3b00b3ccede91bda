"""The plugin of vLLM: its server answers for the adapters of a store, made plain LoRA on first request."""
