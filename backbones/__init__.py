"""The paper's other model families: each a subclass of model.LLaVA that overrides what differs.

To add one, say InternVL, write the overrides below, put its model_type into model.FAMILIES and its
name into model.KNOWN; nothing else has to change (data/metrics.py has the paper's figures of each).
What each override takes and returns is said in model.LLaVA.

    read_config(folder, config)   config.json -> the decoder's sizes (read_text_sizes) and its flags
                                  (set at the end of that; the RPN's two are free where none was
                                  released), "vision" for build_tower, "image_token", "eos_ids",
                                  "tied" (lm_head is embed_tokens).
                                  Where only the tokeniser knows an id, __init__ adds it
    canonical(name), ignored(key) a checkpoint's tensor names -> ours, and those nothing reads; the
                                  decoder's are language_model.layers.0.self_attn.q_proj.weight and
                                  so on, and lm_head.weight
    read_tokenizer(folder, config)   a tokeniser with encode(text) and decode(ids), and what the
                                     next three ask of it; it must fit config.json, or BadInput.
                                     backbones/bpe.py reads a tokenizer.json
    pieces, prompt_ids, tokenize  ids from `pieces` on are never chosen; the others: text -> ids,
                                  in which exactly one "image_token" stands for the whole grid;
                                  tokenize is for logits() alone
    build_tower()                 self.<tower and projector>, on the meta device: parameters are
                                  loaded, buffers are not. LLaVA's own pixels to project, and its
                                  ignored, read self.vision_tower and self.multi_modal_projector
    pixels(picture, box)          how the tower is shown a picture, or a crop of it: (3, H, W)
    token_grid(pixels), grid_of(picture)   (h, w) of image tokens; not square: frame as well
    frame(picture_size)           only where the picture is not padded to a square
    features(pixels)              (b, 3, H, W) -> (b, h*w, C)
    project(features)             (b, n, C) -> (b, n, D): masks of crops are applied before it, so
                                  a pixel shuffle belongs in features
    positions, splice             only where a position is not the token's index, or where
                                  markers stand around an image's tokens, and so around a crop's
    budget                        (least, most) pixels, where a picture may have any size
    recipes                       what was released for its sizes; else `tests/tables.py heads`
                                  writes the recipe.json to put beside config.json

Its limits: one grid for each picture (no tiles, no thumbnail); no decoder tensor that holds q, k
and v at once (split InternLM2's wqkv in the files first); no rotary scaling (read_text_sizes
refuses it). To test one: in tests/golden/, an x_formula.py (tiny CONFIGS, CASES, prompt and
write_checkpoint; tests/report.py lists it) and a make_golden_x.py, compared as in
tests/test_deepseek.py; in tests/random_llava.py, a line in CONFIGS and its special tokens in Words.
"""
