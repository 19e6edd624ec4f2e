"""The paper's other model families: each a subclass of model.LLaVA that overrides what differs.

To add one, say InternVL, write the overrides below, put its model_type into model.FAMILIES and its
name into model.KNOWN. Nothing else names a family, but for the paper's figures in data/metrics.py.

    read_config(folder, config)   config.json -> the decoder's sizes (read_text_sizes), "vision",
                                  "image_token", "eos_ids", "tied", and flags that differ:
                                  qkv_bias, final_norm and score_rope (the RPN's), mrope_section.
                                  Where only the tokeniser knows an id, __init__ adds it
    canonical(name), ignored(key) a checkpoint's tensor names -> ours, and those nothing reads;
                                  the decoder's are language_model.* and lm_head.weight
    read_tokenizer(folder, config)   a tokeniser with encode(text) and decode(ids); it must fit
                                     config.json, or BadInput. backbones/bpe.py is one
    pieces, prompt_ids, tokenize  ids from `pieces` on are never chosen; the others: text -> ids,
                                  in which exactly one "image_token" stands for the whole grid
    build_tower()                 self.<tower and projector>; called before the decoder is made
    pixels(picture, box)          how the tower is shown a picture, or a crop of it: (3, H, W)
    token_grid(pixels), grid_of(picture)   (h, w) of image tokens; frame(picture_size) only where
                                  the picture is not padded to a square
    features(pixels)              (b, 3, H, W) -> (b, h*w, C)
    project(features)             (b, n, C) -> (b, n, D): masks of crops are applied before it
    positions, splice             only where a position is not the token's index, or where
                                  markers stand around an image's tokens
    budget                        (least, most) pixels, where a picture may have any size
    recipes                       what was released for its sizes; else tests/tables.py heads

Its limits: one grid for each picture (no tiles); no decoder tensor that holds q, k and v at once;
no rotary scaling (read_text_sizes refuses it). To test one: a tiny config.json and golden tensors
as in tests/golden/, and a line in CONFIGS of tests/random_llava.py.
"""
