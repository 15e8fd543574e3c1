#!/usr/bin/env bash
# transformers 5.24.0: CLIPTokenizer.from_pretrained takes a folder without any vocabulary, and makes a tokenizer of two words.
#
# Of a tokenizer's folder from which vocab.json, merges.txt and tokenizer.json are missing (a download that was cut off leaves such a one) only
# tokenizer_config.json is wanted. Every letter of a prompt then becomes the token that ends one, so that a text-to-image model that loads this
# folder makes pictures of no prompt at all. Nothing is logged.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 15 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.utils import logging

logging.set_verbosity_warning()
here = Path(sys.argv[1])
whole = here / "whole"
whole.mkdir()
words = ["<|startoftext|>", "<|endoftext|>", *"abcdt", *(f"{letter}</w>" for letter in "abcdt")]
(whole / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
(whole / "merges.txt").write_text("#version: 0.2\n")
CLIPTokenizer.from_pretrained(whole).save_pretrained(whole)
bare = here / "bare"
bare.mkdir()
(bare / "tokenizer_config.json").write_bytes((whole / "tokenizer_config.json").read_bytes())
for place in (whole, bare):
    tokenizer = CLIPTokenizer.from_pretrained(place)
    tokens = [tokenizer.decode([i]).strip() for i in tokenizer("a cat")["input_ids"]]
    print(f"{place.name}: {len(tokenizer)} words; 'a cat' is {tokens}")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" "$folder" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
cat "$folder/errors.txt"
echo "$said"
expected="whole: 12 words; 'a cat' is ['<|startoftext|>', 'a', 'c', 'a', 't', '<|endoftext|>']
bare: 2 words; 'a cat' is ['<|startoftext|>', '<|endoftext|>', '<|endoftext|>', '<|endoftext|>', '<|endoftext|>', '<|endoftext|>']"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
