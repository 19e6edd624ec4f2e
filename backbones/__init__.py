"""The paper's other model families. Each is a subclass of model.LLaVA that overrides what differs.

To add one, say InternVL: write the overrides below in a file of its own and put its model_type into
model.FAMILIES. Nothing else has to change. model.LLaVA says what each override takes and returns.

    read_config(folder, given)    config.json -> model.Config, by decoder_config(text, ...), with
                                  whatever build_tower() takes as `vision`. expect(...) refuses by
                                  name each entry that changes an answer and is not implemented
    read_tokenizer(folder, config)   a tokeniser with encode(text), decode(ids), get_piece_size(),
                                     and what prompt_ids() asks of it. bpe.py reads tokenizer.json
    renames()                     [(prefix of a stored name, ours or None: never read), ...]. Ours:
                                  language_model.layers.0.self_attn.q_proj.weight, lm_head.weight
    recipes                       {(model_type, layers, width): fields of sdrpn.Recipe} as released.
                                  Without one, tests/paper/tables.py heads finds layers and heads
    build_tower()                 the modules that features() and project() run, on the meta device:
                                  parameters are loaded, buffers are not
    prompt_ids(question, history) the prompt's ids, in which one image_token stands for the image
    pixels(picture, box)          the picture, or a crop of it, as the tower sees it: (3, H, W)
    token_grid(pixels), grid_of(picture)   (h, w) of image tokens
    frame(picture_size)           only where the picture is not padded to a square
    features(pixels)              (b, 3, H, W) -> (b, h*w, C)
    project(features)             (b, n, C) -> (b, n, D) for any n cells: a crop's mask is applied
                                  before it, so a pixel shuffle belongs in features()
    image_positions, splice       only where a token's position is not its index, or where markers
                                  stand around an image's tokens and so around a crop's

The limits: one grid for each picture (no tiles, no thumbnail); no tensor that holds the decoder's
q, k and v at once (split them in the files first); no rotary scaling.
To test one, write tests/golden/x_formula.py (tiny models) and make_golden_x.py (a reference
library's outputs), and compare as tests/test_deepseek.py does.
"""
