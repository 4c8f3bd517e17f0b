"""How hosts are told of packed linear layers: one module per backend whose checkpoints are safetensors."""
