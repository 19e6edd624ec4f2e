"""The paper's other model families: each a subclass of model.LLaVA that overrides what differs.

To add one, say InternVL, write the overrides below, put its model_type into model.FAMILIES and its
name into model.KNOWN. Nothing else names a family.

    read_config(folder, config)   config.json -> the decoder's sizes (read_text_sizes), "vision",
                                  "image_token", "eos_ids", "tied", and flags that differ:
                                  qkv_bias, final_norm and score_rope (the RPN's), mrope_section
    canonical(name), ignored(key) a checkpoint's tensor names -> ours, and those nothing reads
    read_tokenizer(folder, config), pieces, prompt_ids, tokenize, detokenize
    build_tower()                 the vision tower and the projector
    pixels(picture, box)          how the tower is shown a picture, or a crop of it: (3, H, W)
    token_grid(pixels), grid_of(picture), frame(picture_size)
    features(pixels)              (b, 3, H, W) -> (b, h*w, C)
    project(features)             (b, n, C) -> (b, n, D): masks of crops are applied before it
    positions, rope, splice       only where a position is not the token's index
    recipes                       what was released for its sizes; else tests/tables.py heads

Its limits: one grid for each picture (no tiles); a checkpoint's tensor is one of ours, not three.
"""
