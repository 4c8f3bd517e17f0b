"""Language models of transformers in the layout that llama.cpp reads.

`families` says which kinds there are, `names` what their tensors are called, `hyperparameters` what
of `config.json` the reader needs, `tokenizer` how text becomes tokens. `architecture` puts it
together. Everything comes from the files of the folder: neither transformers nor a tokenizer
library is needed.

Source of names, keys and rules: llama.cpp's conversion scripts as of ggml 0.25.3.
"""
