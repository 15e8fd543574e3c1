#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.24.0: ZImagePipeline.encode_prompt writes the chat template into the caller's list of prompts.
#
# A prompt given as a string is left alone. In a list each entry is replaced by itself within the template, in place, so the second
# call with the same list wraps it twice: other embeddings, and other images for the same seed. Giving list(prompts) is right.
# Reported as Tongyi-MAI/Z-Image issue 99.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below, with a tiny net and a template of one line.
# Wants python3, pip and network; 300 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
from diffusers import ZImagePipeline
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
sizes = dict(vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=2, head_dim=4)
encoder = Qwen3Model(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
pipeline = ZImagePipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
prompts = ["a cat"]
for call in (1, 2):
    pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    print(f"after call {call}: {prompts[0]}")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='after call 1: <user>a cat</user>
after call 2: <user><user>a cat</user></user>'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
