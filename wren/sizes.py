"""Every size of Wren, and where its training keeps what the parts give each other.

The work folder (``--work``, ``.work/wren`` by default):

speech/VOICE/index.jsonl    one line an utterance: text, voice, speed, file (beside the index), samples, rate
speech/VOICE/*.flac         16 bits, one channel: 24 kHz of a reply voice, 16 kHz of a question voice
codes/codebook.safetensors  mean [160], basis [160, 48], centres [CODES, 48], mels [CODES, 160] (two frames each)
codes/VOICE.jsonl           one line a sentence: text, split, codes (ids as talker and DiT know them)
spk_dict.pt                 {voice: {"cond": [1, 192], "ref_mel": [1, frames, 80]}}, float32; bos_token comes with the
                            tokenizer
bigvgan.safetensors         weights and bigvgan.json, the part's config.json
dit.safetensors             weights (averaged over the last steps) and dit.json
frame/                      the checkpoint with untrained weights: its configuration and tokenizer
vision.safetensors          weights of the vision encoder that names what it sees; the thinker starts from them
thinker.first.safetensors   weights of transformers' thinker after its first course
thinker.second.safetensors  and after its second; so third and fourth
thinker.safetensors         and after all five
talker.first.safetensors    weights of the talker with small tables, and of the thinker's rows that only it reads, after
                            its first course
talker.safetensors          and after both
answers.json                what wren.evaluate measured
NAME.train.pt               state of a training: weights, optimizers, step; a training that stopped goes on from it
NAME.log                    its progress
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORK = Path(".work/wren")

# Voices of replies: name as in Qwen2.5-Omni -> flite's voice.
REPLY_VOICES = {"Chelsie": "slt", "Ethan": "rms"}
REPLY_SPEEDS: tuple[float, ...] = (1.0,)
# Sentences of each voice that vocoder, codebook and DiT are trained with: the first of the world. The talker has all.
SPEECH_REPLIES = 2000
# Voices that ask: a Scottish man and an American woman. `rms` and `kal16` are never heard in training.
QUESTION_VOICES = ("awb", "slt")
QUESTION_SPEEDS: tuple[float, ...] = (0.85, 1.0, 1.2)  # one for each sentence and voice

# Sound of a reply. A code is two mel frames: 20 ms.
RATE = 24000
HOP = 240
MELS = 80
FRAMES_PER_CODE = 2
SAMPLES_PER_CODE = HOP * FRAMES_PER_CODE
# Sound of a question, as the audio encoder takes it.
QUESTION_RATE = 16000

# Codes that stand for a sound: ids 1 to CODES. Id 0 is what the DiT's guidance reads instead of a code, so it is no
# sound. Table sizes and control ids are the published ones: transformers' `generate` stops on 8292 and 8294 unless it
# is told otherwise, and a smaller table has no such rows. The rows that are never used cost 2.4 M parameters (4.8 MB
# in BF16), but no time in training, where they share one row.
CODES = 1024
FIRST_CODE = 1
CODEC_TABLE = 8448
CODEC_PAD, CODEC_START, CODEC_END, CODEC_MASK = 8292, 8293, 8294, 8296

TIMBRE = 192  # width of a speaker vector ("cond")
REFERENCE_FRAMES = 200  # of a voice's reference mel

DIT: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "head_dim": 64,
    "ff_mult": 2,
    "emb_dim": 64,
    "num_embeds": 8193,
    "repeats": FRAMES_PER_CODE,
    "block_size": 24,
    "look_backward_layers": [0, 4],
    "look_ahead_layers": [2],
    "mel_dim": MELS,
    "dropout": 0.0,
    "max_position_embeddings": 32768,
    "enc_emb_dim": TIMBRE,
    "enc_dim": 128,
    "enc_channels": [32, 32, 32, 32, 96],
    "enc_kernel_sizes": [5, 3, 3, 3, 1],
    "enc_dilations": [1, 2, 3, 4, 1],
    "enc_attention_channels": 16,
    "enc_se_channels": 16,
    "enc_res2net_scale": 2,
}

BIGVGAN: dict[str, Any] = {
    "mel_dim": MELS,
    "upsample_initial_channel": 128,
    "upsample_rates": [5, 4, 4, 3],
    "upsample_kernel_sizes": [11, 8, 8, 7],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
}

# Text: regular tokens of the tokenizer, and rows of the thinker's tables (control tokens and voices come behind).
REGULAR_TOKENS, TEXT_TABLE = 1100, 1280

THINKER: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mrope_section": [4, 6, 6],
    "rope_theta": 10000.0,
}
AUDIO: dict[str, Any] = {"d_model": 128, "encoder_attention_heads": 4, "encoder_ffn_dim": 512, "encoder_layers": 3}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_heads": 3,
    "fullatt_block_indexes": [0, 2],
}
TALKER: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mrope_section": [4, 6, 6],
    "rope_theta": 10000.0,
}
