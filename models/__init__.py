"""How tokens are computed: engine, KV cache, sampling, tokenization."""
