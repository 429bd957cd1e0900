"""L3: what others wrote: model families as data, configurations, GGUF and safetensors files, tokenizers."""
