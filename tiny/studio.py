"""The folder tiny/, and those of its models that its making stands on."""

import os
from functools import cache

import torch

import musicinfuser as mi

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(HERE, "work")  # unfinished stages, songs that nothing was trained on
# Of the matrices: four times as fast where the CPU has AMX, a hundred times as slow without AVX-512
DTYPE_NAME = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
DTYPE = mi.DTYPES[DTYPE_NAME]


def in_folder(name):
    return os.path.join(HERE, name)


@cache
def frozen_encoder():
    return mi.load_encoder(in_folder("encoder.safetensors"), dtype=DTYPE)


class Captions:
    """Captions to T5 features, as sampling makes them, but for many at once."""

    def __init__(self):
        self.tokenizer = mi.from_pretrained("AutoTokenizer", in_folder("tokenizer"))
        self.t5 = mi.load_pretrained_model("T5EncoderModel", in_folder("text_encoder"), "cpu")

    @torch.no_grad()
    def __call__(self, texts):
        """((B, L, D), (B, L) bool)"""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return self.t5(**tokens).last_hidden_state, tokens.attention_mask.bool()
