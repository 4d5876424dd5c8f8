"""A text that shows how a tokenizer reads: what normalisers, splits and merges could treat otherwise stands in it."""

# ruff: noqa: RUF001 - it is full of letters that look like others

from __future__ import annotations

#: scripts, digits, whitespace runs, emoji, combining marks, code, controls, contractions, and tags that are none
PROBE = "\n".join(
    (
        "The quick brown fox doesn't jump; IT'S the dog's turn, they'LL say. We'd I'm you've O'CLOCK naïve Straße",
        "今天天气真好，我们去公园散步吧！\u3000“引号”… 朝の光、コーヒー。ﾊﾝｶｸ 오늘은 하늘이 \u1112\u1161\u11ab",
        "Съешь же ещё булок; Ωμέγα ϑ; مرحبا كَيْفَ؟ שָׁלוֹם नमस्ते क्षत्रिय สวัสดีชาวโลก ქართული Հայ አማርኛ İstanbul ıI ŞŢ",
        "3.14159 1,234,567.89 ½ ² Ⅷ ① 2026-03-01T00:00:00Z ٣٫١٤ १२३ 1e-9 0xFF １２３ 12 345 6789",
        " \t leading\n\n \n  two   three    \u00a0nbsp\u2003em\u200bzero\u2028ls\x0b\x0c\x85\r\n\r trailing \t ",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3"
        " \U0001f1eb\U0001f1f7 \u2603\ufe0e \U0001f600\U0001f600",
        "e\u0301 \u00e9 a\u030a\u0301 n\u0303 \u212b \u1e9b\u0323 q\u0307\u0323 o\u0302\u0323 \ufb01 \uff21 \u2460 µ",
        "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # ok\n\n\nclass A:\r\n    pass\n<html>&amp;</html> a?b=c#d **x",
        "∑_{i=1}^{n} αᵢ·x² ≤ ∞ ⇒ ∀ε>0 ∃δ; \x00\x01\x7f\ufeff\ufffd\U0010ffff <| almost |> <|im_star </tool <s> [INST]",
        "Mix中文andالعربية123abc—“quotes”…?!?! ---- ==== __init__ don’t (x) .. . , ;; 's 'S 're ''ll ?  \n ",
    )
)
