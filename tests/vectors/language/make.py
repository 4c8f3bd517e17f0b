"""Makes the golden data of language models from llama.cpp's own conversion script.

    python -m tests.vectors.language.make --tokenizers
    python -m tests.vectors.language.make LLAMA_CPP_FOLDER

The first form trains the tokenizers (with `tokenizers` and `sentencepiece`) and is run once: other
versions may train others. The second converts the models of `tests/language/models.py` with the
script in a checkout of llama.cpp and writes `expected.json`: per model every tensor with type,
shape and SHA-256 of its bytes, and all metadata, lists of more than 16 items as their SHA-256; and
`special_tokens.json`: what its reader of special tokens finds in the folders of the test.

The script tells the way of splitting text by a hash that only knows published vocabularies; it is
told the answer instead, by the name of the tokenizer's folder.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MOST_ITEMS = 16

SENTENCE = (
    "the quick brown fox jumps over a lazy dog model weights and tokens are rings of gold I'll we've café naïve "
    "Привет мир 日本語 hello World NUMBERS 1 22 333 4444 3.14 ==> {x} (y) don't"
)


def corpus() -> list[str]:
    chosen, words = random.Random(1), SENTENCE.split()
    return [" ".join(chosen.choice(words) for _ in range(12)) for _ in range(500)]


def make_tokenizers() -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(corpus()), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=f"{folder}/pieces",
            vocab_size=480,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<turn>"],
            minloglevel=2,
        )
        target = HERE / "pieces"
        target.mkdir(exist_ok=True)
        shutil.copy(f"{folder}/pieces.model", target / "tokenizer.model")
    decoder = {str(n): {"content": text, "special": True} for n, text in enumerate(["<unk>", "<s>", "</s>"])}
    decoder["480"] = {"content": "<|end|>", "special": False}
    decoder["481"] = {"content": "▁▁two words", "special": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    write(HERE / "pieces" / "tokenizer_config.json", settings)
    write(HERE / "pieces" / "generation_config.json", {"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    make_pieces_json()
    for name in ("llama-bpe", "qwen2"):
        make_byte_pairs(name)


def make_pieces_json() -> None:
    """The same pieces as transformers writes them where it keeps no `tokenizer.model`."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "pieces" / "tokenizer.model", folder)
        made = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
        made.save_pretrained(folder)
        target = HERE / "pieces-json"
        target.mkdir(exist_ok=True)
        write(target / "tokenizer.json", json.loads(Path(folder, "tokenizer.json").read_text("utf-8")), indent=None)


def make_byte_pairs(name: str) -> None:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from weightpack.language.pre_tokenizers import ROWS

    (row,) = (row for row in ROWS if row.name == name)
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=row.ignores_merges))
    split = pre_tokenizers.Split(Regex(row.steps[0][1]), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    # transformers' class for Qwen adds the first of these where a vocabulary lacks it.
    made.add_special_tokens(["<|endoftext|>", "<|begin|>", "<|end|>", "<|turn|>"])
    made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False), tokenizers.AddedToken("two words")])
    settings = {"eos_token": "<|end|>", "pad_token": "<|turn|>", "add_bos_token": False}
    if name == "llama-bpe":
        begin = made.token_to_id("<|begin|>")
        template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B", [("<|begin|>", begin)])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        settings = {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
    target = HERE / name
    target.mkdir(exist_ok=True)
    write(target / "tokenizer.json", json.loads(made.to_str()), indent=None)
    write(target / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    (target / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write(path: Path, value: object, indent: int | None = 1) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")


CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer, name=sys.argv[2]: name
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(llama_cpp: Path, model: Path, tokenizer: str, target: Path, kind: str) -> None:
    """Runs the script."""
    words = [str(llama_cpp), tokenizer, str(model), "--outfile", str(target), "--outtype", kind]
    subprocess.run([sys.executable, "-c", CONVERT, *words], check=True, capture_output=True)


FIND = """
import json, sys
sys.path.insert(0, f"{sys.argv[1]}/gguf-py")
import gguf
written = {}
class Writer:
    def __getattr__(self, name):
        getattr(gguf.GGUFWriter, name)
        return lambda value: written.setdefault(name, value)
gguf.SpecialVocab(sys.argv[2], n_vocab=int(sys.argv[3])).add_to_gguf(Writer(), quiet=True)
print(json.dumps(written))
"""


def find_special_tokens(llama_cpp: Path) -> dict[str, dict[str, object]]:
    """Keys and values of each case of `tests/language/test_special_tokens.py`."""
    from tests.language.test_special_tokens import ADDED, CASES, files
    from weightpack.language.special_tokens import KEYS

    expected = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in files(case).items():
                (Path(folder) / name).write_text(json.dumps(value))
            words = [sys.executable, "-c", FIND, str(llama_cpp), folder, str(len(ADDED))]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
        expected[case] = {
            f"tokenizer.ggml.{key_of(name, KEYS)}": value
            for name, value in json.loads(done.stdout).items()
            if name != "add_chat_template"
        }
    return expected


def key_of(writer: str, kinds: dict[str, str]) -> str:
    """The key that a method of `GGUFWriter` writes."""
    name = writer.removeprefix("add_")
    kind = name.removesuffix("_token_id")
    return f"{kinds[kind]}_token_id" if name != kind else name


def describe(path: Path) -> dict[str, object]:
    """Tensors and metadata of a GGUF file, long lists and data as hashes."""
    import gguf

    reader = gguf.GGUFReader(path)
    pairs = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        kinds = [kind.name.lower() for kind in field.types]
        pairs[key] = [kinds, shortened(field.contents())]
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(n) for n in reversed(tensor.shape)],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        ]
        for tensor in reader.tensors
    }
    return {"metadata": pairs, "tensors": tensors}


def shortened(value: object) -> object:
    if isinstance(value, list) and len(value) > MOST_ITEMS:
        text = json.dumps(value, ensure_ascii=False)
        return {"count": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path, nargs="?")
    parser.add_argument("--tokenizers", action="store_true")
    choices = parser.parse_args()
    if choices.tokenizers:
        make_tokenizers()
        return
    from tests.language.models import CONFIGS, make_model

    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            model, target = make_model(Path(folder) / name, name), Path(folder) / f"{name}.gguf"
            convert(choices.llama_cpp, model, config["tokenizer"], target, "f32")
            expected[name] = describe(target)
    peer = {"peer": "llama.cpp convert_hf_to_gguf.py", "version": "as of ggml 0.25.3"}
    write(HERE / "expected.json", {**peer, "models": expected})
    write(HERE / "special_tokens.json", {**peer, "cases": find_special_tokens(choices.llama_cpp)})


if __name__ == "__main__":
    main()
