"""Scores and question files: golden values of the common harness, and miniatures of every original file.

    python -m pytest tests/test_data.py      # a few seconds, no network, no model
"""
import base64
import csv
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip import BadInput  # noqa: E402
from data import benchmarks, llava_mix, metrics, questions  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def save(path, content):
    """Write text, bytes, or anything else as JSON; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def png():
    file = io.BytesIO()
    Image.new("L", (4, 3)).save(file, "png")
    return file.getvalue()


def convert(program, out, *arguments):
    """Run a converter -> the folder of the pictures, questions."""
    program.main([*map(str, arguments), "--out", str(out)])
    first, *found = map(json.loads, out.read_text().splitlines())
    assert len(questions.read_questions(out)[0]) == len(found)
    return Path(first["images"]), found


def refusal(capsys, program, *arguments):
    """Run a program that must refuse -> its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        program.main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


def test_the_readme_names_every_field_metric_and_benchmark():
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    names = {*questions.FIELDS, *metrics.METRICS, *benchmarks.BENCHMARKS}
    assert not [name for name in names if f"`{name}`" not in text]
    assert not [b.hub for b in benchmarks.BENCHMARKS.values() if f"| {b.hub} | `{b.parquet}` |" not in text]


# ---- metrics -----------------------------------------------------------------------------------------------------

# Golden values that stand in a docstring's example are not repeated here.
NORMALISED = {
    "3.": "3", "$5.00": "$5.00", "Jack Daniel's": "jack daniel 's", "a b-c": "b c", "-5": "5", "7-up": "7 up",
    "Route 66.": "route 66", "50%": "50%", "10:30 am": "10:30 am", "A": "", "Ten\tred\ncars!": "10 red cars",
    "somebody'd": "somebodyd", "couldn'tve": "couldn't've", "couldntve": "couldntve", "yall'll": "y'all'll",
    "." * 40 + "x": "." * 8 + "x"}   # at most 32 full stops go


def test_vqa_normaliser():
    assert {text: metrics.normalise(text) for text in NORMALISED} == NORMALISED
    one = [word for word in metrics.CONTRACTIONS.values() if word.count("'") == 1]
    assert len(one) == 73   # 75 in the harness, of which I'm and I've can never match


def test_vqa_accuracy_leaves_one_out():
    scores = [metrics.vqa_accuracy("Dogs.", ["dogs"] * n + ["cat"] * (10 - n)) for n in range(5)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, 1])


OPTIONS = {"A": "red", "B": "blue"}
SCORES = {   # metric: (reply, answers with bars between them, score)
    "exact": [("red", "blue|Red", 1)],
    "anls": [
        (" Hello\n", "hello", 1), ("abc", "abcdefg", 0), ("helo", "world|hello", 0.8), ("", "", 1),
        ("a b", "a  c", 0.75),   # one edit in "a c", over the 4 letters of the raw "a  c"
        ("a", "\u00df", 0.5), ("Hauptstr", "Hauptstra\u00dfe", 0.75),   # sharp s counts as SS, two letters
        (" s", " |an yes. hello?", 0.5)],   # one edit from "" to "s", over the 2 letters of the raw " s"
    "relaxed": [
        ("10.5", "10", 1), ("0", "0", 1), ("2014", "2000", 1), ("-10", "-10.2", 1), ("10.4", "5|10", 1),
        ("0.0", "0", 0), ("1,000", "1000", 0), ("Yes.", "Yes", 0), ("10", "10%", 0),
        (" Yes", "Yes", 0)],   # nothing is stripped
    "ocrbench": [
        ("two\nlines", "Two Lines", 1), ("two lines", "Two\nLines", 1), ("t wo", "two", 0),
        ("so 4", "5|4", 1)],
    "HME100k": [("x ^ 2\n+ 1", "x^2 + 1", 1), ("A + B", "a+b", 1), ("A + B", "A+B", 0)],   # a part of OCRBench
    "letter": [("Blue", "A|b", 1), ("It was blue", "A", 0)],
    "hr": [("it is red", "A", 1), ("neither", "A", 0)],
    "pope": [("Yes", "yes", 1), ("Yes.", "yes", 0)]}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    metric = "ocrbench" if name == "HME100k" else name
    for reply, answers, want in SCORES[name]:
        question = {"metric": metric, "answers": answers.split("|"), "options": OPTIONS, "dataset": name}
        assert metrics.score(question, reply) == want, reply


LETTERS = {
    " b": "B", "Cotton": "C", "Blue": "B", "Answer: D": "A", "and B": "A", "The answer is blue": "B",
    "Option: C": "C", "It is (b), not C": "B", "I pick B]": "B", "Not b. but (c)": "C", "I see C and a cat": "C",
    "It was blue": None, "kevlar": "A", "it is so": None}
HR_LETTERS = {
    "(B)": "B", "Blue": "B", "A B": None, "A or B: red": "A", "Z": "Z", "Cannot determine the answer.": "Z", "": None}


def test_letters_of_replies():
    assert {reply: metrics.choice_letter(reply) for reply in LETTERS} == LETTERS
    options = OPTIONS | {"C": "light blue"}
    assert {reply: metrics.hr_letter(reply, options) for reply in HR_LETTERS} == HR_LETTERS


def test_overlap_is_by_exact_areas():
    for crops, box, want in (
            ([(0, 0, 50, 100), (0, 0, 50, 50)], (0, 0, 100, 100), (True, 0.5)),   # overlapping crops
            ([(0, 0, 50, 50)], (-9, -9, 50, 50), (True, 1)),   # what sticks out does not count
            ([(7, 5, 12, 15)], (7, 5, 17, 15), (True, 0.5)),   # smaller than a cell of a 256 x 256 raster
            ([(17, 5, 97, 15)], (7, 5, 17, 15), (False, 0)), ([], (7, 5, 17, 15), (False, 0))):
        assert metrics.overlap(crops, [box], (7680, 4320)) == want
    with pytest.raises(BadInput, match=r"\(500, 0, 600, 50\) lies outside the picture of 100x100"):
        metrics.overlap([], [(500, 0, 600, 50)], (100, 100))


# ---- tables ------------------------------------------------------------------------------------------------------

LLAVA_7B = SimpleNamespace(model_type="llava", num_hidden_layers=32, hidden_size=4096)


def logged(metric, kinds, plain, two=(), config=LLAVA_7B, **benchmark):
    """Evaluate replies, of which "yes" or A is right -> (lines that side_by_side logs, its summary, rows)."""
    want, rows, lines = "yes" if metric == "pope" else "A", [], []
    for kind in kinds:
        rows.append({"metric": metric, "kind": kind, "answers": [want]} | benchmark)
    for name, replies in (("plain", plain), ("two_stage", two)):
        for row, reply in zip(rows, replies):
            row[name] = {"answer": reply, "score": float(reply.lower() == want.lower()), "seconds": 1.0}
            if reply == "?":   # a question without answers
                row[name]["score"] = None
            if reply == "yes":
                row[name] |= {"covers": True, "iou": 0.5}
    summary = metrics.side_by_side(rows, lines.append, config)
    return [" ".join(line.split()) for line in lines], summary


def test_official_scores_of_pope_beside_the_papers():
    lines, summary = logged("pope", ["random"] * 4, ["yes", "no", "no", "maybe"], ["yes", "Yes", "no", "yes"],
                            benchmark="pope")
    assert lines == [
        "kind n s plain s two recall IoU change \u00b1 lost won plain two_stage paper, plain paper, SD-RPN",
        "random 4 1.000 1.000 100.0 0.50 +50.0 56.6 0 2 25.0 75.0 - -",
        "all 4 1.000 1.000 100.0 0.50 +50.0 56.6 0 2 25.0 75.0 - 87.8",
        "precision - - - - - - - - - 100.0 100.0 - -", "recall - - - - - - - - - 33.3 75.0 - -",
        "F1 - - - - - - - - - 50.0 85.7 85.9 87.1"]   # 2 * 1 / (2 * 1 + 2), and 2 * 3 / (2 * 3 + 1)
    assert (summary["plain"], summary["two_stage"], summary["metric"]) == (50, 85.71, "pope")
    assert summary["official"]["plain"] == {
        "random": 25.0, "all": 25.0, "precision": 100.0, "recall": 33.33, "F1": 50.0}


def test_the_papers_figures_stand_beside_their_own_model_alone():
    kinds = ["single", "cross", "single"]
    lines, _ = logged("hr", kinds, "ABA", benchmark="hrbench8k")
    assert lines == ["kind n s plain plain paper, plain paper, SD-RPN", "single 2 1.000 100.0 - 46.5",
                     "cross 1 1.000 0.0 - 31.8", "all 3 1.000 66.7 33.8 39.1"]
    lines, _ = logged("hr", kinds, "ABA", config=None, benchmark="hrbench8k")
    assert lines[-1] == "all 3 1.000 66.7"
    named = {name for model in json.loads(metrics.PAPER.read_text()).values() for name in model}
    assert named == {*benchmarks.BENCHMARKS}


def test_questions_without_answers_count_for_times_alone():
    lines, summary = logged("exact", ["all", "word", "word"], "BA?")   # the first has no kind
    assert lines == ["kind n s plain plain", "word 2 1.000 100.0", "all 3 1.000 50.0"]
    assert (summary["questions"], summary["scored"], summary["plain"]) == (3, 2, 50)
    lines, summary = logged("exact", ["word"], "?", "?")
    assert lines[0] == "kind n s plain s two" and summary == {"questions": 1, "metric": "exact", "scored": 0}


def test_compare_is_a_table_of_kinds():
    asked = [(None, {"kind": kind, "answers": ["a"]}) for kind in ("word", "red\x1b[2J", "word")]
    header, line = metrics.compare(asked, {"plain": lambda picture, q: "a"}).split("\n")
    assert header.split() == ["word", r"red\x1b[2J", "all", "s/question"]
    assert line.split()[:4] == ["plain", "100.0", "100.0", "100.0"]


# ---- question files ----------------------------------------------------------------------------------------------

ASKED = {"image": "a.png", "question": "Why?"}


def test_a_question_file_is_read(tmp_path):
    more = {"question": ["What?", "Why?"], "answers": ["A"], "boxes": [[-1, 0.5, 3, 4]], "kind": None}
    lines = ['\ufeff{"images": "pictures"}', "", json.dumps(ASKED), json.dumps(ASKED | more), ""]
    path = save(tmp_path / "q.jsonl", "\r\n".join(lines))
    (first, second), root = questions.read_questions(path)
    assert root == tmp_path / "pictures" and questions.read_questions(path, tmp_path)[1] == tmp_path
    assert first == {"image": "a.png", "question": ["Why?"], "line": 3}
    assert second["question"] == ["What?", "Why?"] and "kind" not in second and second["line"] == 4


BAD_ANSWERS = {
    "exact": ['["stop", "halt"]', "['stop']"], "vqa": ["red"], "relaxed": ["nan", " Yes"], "letter": ["(A)", "E", "D"],
    "hr": ["C", "red", "Z"], "pope": ["Yes."], "ocrbench": [" "]}


@pytest.mark.parametrize("change", [
    {"question": [" "]}, {"question": 5}, {"image": None}, {"image": "/a.png"},
    {"image": "a/../../b.png"}, {"answers": "yes"}, {"metric": "length"}, {"options": {"A": 5}}, {"tau": 15},
    {"max_new_tokens": True}, {"kind": "\udfff"}, {"boxes": [[1, 2, 3]]}, {"boxes": [[5, 2, 3, 4]]},
    {"boxes": [[1, 2, 1, 4]]}, {"boxes": [[1, 2, math.nan, 4]]},
    *({"metric": metric, "answers": [answer], "options": OPTIONS} for metric in BAD_ANSWERS
      for answer in BAD_ANSWERS[metric])])
def test_a_question_that_can_not_be_asked_or_scored_is_refused_with_its_line(tmp_path, change):
    path = save(tmp_path / "q.jsonl", "\n".join(map(json.dumps, (ASKED, ASKED | change))))
    with pytest.raises(BadInput, match="q.jsonl line 2: .*README.md"):
        questions.read_questions(path)


@pytest.mark.parametrize("text, says", [
    ('{"image": ', "line 1: "), (b"\xff\xfe\x00", "utf-8"), ("", "holds no question"),
    (None, "No such file")])
def test_a_damaged_question_file_is_one_line(tmp_path, text, says):
    path = tmp_path / "q.jsonl"
    if text is not None:
        save(path, text)
    with pytest.raises(BadInput, match=f"q.jsonl.*{says}"):
        questions.read_questions(path)


def test_answers_of_the_benchmarks_are_read():
    for metric, answers in {"exact": [""], "vqa": ["A"] * 10, "anls": [""], "letter": [" b"], "hr": ["a"],
                            "relaxed": ["0", "[2011, 2012]", "[Austria, Chile]"], "pope": ["No"],
                            "ocrbench": ["A+B"]}.items():
        questions.check_question(ASKED | {"metric": metric, "answers": answers, "dataset": "HME100k",
                                          "options": OPTIONS})


def test_a_metric_is_added_in_one_place(monkeypatch):
    rule = metrics.Metric(lambda prediction, answers: float(len(prediction) == len(answers[0])))
    monkeypatch.setitem(metrics.METRICS, "length", rule)
    q = questions.check_question(ASKED | {"answers": ["ab"], "metric": "length"})
    assert [metrics.score(q, reply) for reply in ("xy", "xyz")] == [1, 0]


# ---- benchmarks --------------------------------------------------------------------------------------------------

TEXTVQA = {"image_id": "003a", "question_id": 34602, "question": "What does the NASA sign say?", "answers": ["no"] * 10}
DOCVQA = {"questionId": 337, "question": "What is the Date?", "answers": ["1/8/93", "1993"]}
CHART = {"imgname": "1.png", "query": "How many bars?", "label": 0}
OCR = {"dataset_name": "IIIT5K", "image_path": "1.png", "question": " what is written? ", "answers": "CENTRE",
       "type": "Regular Text Recognition"}
GLOVE = {"question_id": 7, "image": "sa_1.png", "category": "direct_attributes", "label": "A",
         "text": "What is the material of the glove (left)?\n(A) rubber\n(B) cotton" + LETTER}
POPE = {"question_id": 1, "image": "1.png", "label": "yes", "text": "Is there a snowboard\u2028?"}   # a line separator
HR = {"index": 9, "question": "How many? ", "answer": "A", "category": "single", "A": 0, "B": '"dark"\tblue',
      "C": None, "D": math.nan, "cycle_category": "0", "image": base64.b64encode(png()).decode()}


def tsv(*rows):
    file = io.StringIO()
    table = csv.DictWriter(file, rows[0], delimiter="\t")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


DATE = {"id": "337", "question": "What is the Date?" + SHORT, "answers": ["1/8/93", "1993"]}
CASES = {   # name: (official file, its content, where its picture is, the hub's row,
           # metric, token limit, the rest of the question)
    "textvqa": ("val.json", {"data": [TEXTVQA]}, "train_images/003a.jpg", TEXTVQA, "vqa", 1024, dict(
        id="34602", question="What does the nasa sign say?" + SHORT, answers=["no"] * 10)),
    "docvqa": ("val.json", "\ufeff" + json.dumps({"data": [DOCVQA | {"image": "documents/a.png"}]}), "documents/a.png",
               DOCVQA, "anls", 32, DATE),
    "infovqa": ("val.json", {"data": [DOCVQA | {"image_local_name": "2.jpeg"}]}, "infographicsvqa_images/2.jpeg",
                DOCVQA, "anls", 32, DATE),
    "chartqa": ("test_human.json", [CHART], "png/1.png",
                {"type": "human_test", "question": "How many bars?", "answer": "0"}, "relaxed", 16, dict(
        id="0", kind="human", question="How many bars?\nAnswer the question with a single word.", answers=["0"])),
    "ocrbench": ("OCRBench.json", [OCR], "OCRBench_Images/1.png",
                 {"dataset": "IIIT5K", "question": "what is written?", "question_type": OCR["type"],
                  "answer": ["CENTRE"]}, "ocrbench", 128, dict(
        id="0", kind="Regular Text Recognition", dataset="IIIT5K", question="what is written?",
        answers=["CENTRE"])),
    "vstar": ("test_questions.jsonl", json.dumps(GLOVE) + "\r\n\r\n", "sa_1.png", GLOVE, "letter", 16, dict(
        id="7", kind="direct_attributes", answers=["A"],
        question="What is the material of the glove (left)?\nA. rubber\nB. cotton" + 2 * LETTER)),
    "pope": ("coco_pope_random.json", json.dumps(POPE, ensure_ascii=False) + "\n", "val2014/1.png",
             {"question_id": 1, "category": "random", "question": POPE["text"], "answer": "yes"}, "pope", 128, dict(
        id="0", kind="random", question="Is there a snowboard\u2028?" + SHORT, answers=["yes"])),
    "hrbench4k": ("hr_bench_4k.tsv", tsv(HR), "elsewhere/1.png", HR | {"A": "0"}, "hr", 1024, dict(
        id="9", kind="single", answers=["A"], options={"A": "0", "B": '"dark"\tblue'},
        question='How many?\nA. 0\nB. "dark"\tblue\nAnswer the option letter directly.')),
}


def hub_file(path, row):
    """A parquet file as the hub has them, the picture as {"bytes", "path"}."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    row = row | ({} if "cycle_category" in row else {"image": {"bytes": png(), "path": None}})
    parquet.write_table(pa.Table.from_pylist([row]), path)
    return path


@pytest.mark.parametrize("source", ["official", "hub"])
@pytest.mark.parametrize("name", CASES)
def test_official_files_and_the_hubs_give_the_same_questions(tmp_path, capsys, name, source):
    file, content, picture, row, metric, limit, want = CASES[name]
    if source == "official":
        save(tmp_path / picture, png())
        files = save(tmp_path / file, content)
    else:
        files = tmp_path / "hub"
        hub_file(files / f"{benchmarks.BENCHMARKS[name].parquet}-of-2.parquet".replace("*", "-"), row)
        hub_file(files / "elsewhere.parquet", row)
    root, found = convert(benchmarks, tmp_path / "out/q.jsonl", name, files)
    assert (root / found[0].pop("image")).read_bytes() == png()
    assert found == [want | {"metric": metric, "max_new_tokens": limit, "benchmark": name}]
    said = capsys.readouterr()
    assert "infer.py --ckpt" in said.out and f"{benchmarks.BENCHMARKS[name].count} questions" in said.err


def test_a_folder_stands_for_one_split(tmp_path):
    names = ("DocVQA/validation-0.parquet", "DocVQA/test-0.parquet", "InfographicVQA/validation-0.parquet")
    files = [save(tmp_path / "DocVQA" / name, "") for name in names]
    assert benchmarks.files_of("docvqa", [tmp_path / "DocVQA"]) == files[:1]
    assert benchmarks.files_of("infovqa", [tmp_path]) == files[2:]


def test_several_files_and_pictures_in_common(tmp_path):
    save(tmp_path / "png/1.png", png())
    files = [save(tmp_path / f"test_{kind}.json", [CHART, CHART]) for kind in ("human", "augmented")]
    _, found = convert(benchmarks, tmp_path / "q.jsonl", "chartqa", *files, "--images", tmp_path / "png")
    assert [q["id"] + q["kind"] for q in found] == ["0human", "1human", "2augmented", "3augmented"]
    assert {q["image"] for q in found} == {"1.png"}
    file = save(tmp_path / "hr.tsv", tsv(HR, HR, HR | {"image": "R0lGOA=="}))   # the last is no picture
    root, found = convert(benchmarks, tmp_path / "q.jsonl", "hrbench4k", file)
    assert len(found) == 2 and len(list(root.iterdir())) == 1   # a picture is unpacked once


def test_vstar_has_true_boxes(tmp_path):
    save(tmp_path / "sa_1.png", png())
    save(tmp_path / "sa_1.json", {"target_object": ["glove"], "bbox": [[1682, 1175, 28, 31]]})
    _, found = convert(benchmarks, tmp_path / "out.jsonl", "vstar", save(tmp_path / "q.jsonl", GLOVE))
    assert found[0]["boxes"] == [[1682, 1175, 1710, 1206]]


def test_a_record_that_can_not_be_used_is_left_out_and_counted(tmp_path, capsys):
    save(tmp_path / "here/sa_1.png", png())
    changes = ({}, {"image": str(tmp_path / "here/sa_1.png")}, {"image": "../here/sa_1.png"}, {"text": "half \ud800"},
               {"label": "(A)"}, {"label": None}, {"image": "gone.png"}, {"image": "\udfff.png"})
    file = save(tmp_path / "here/q.jsonl", "\n".join(json.dumps(GLOVE | change) for change in changes))
    assert len(convert(benchmarks, tmp_path / "q.jsonl", "vstar", file)[1]) == 1
    said = capsys.readouterr().err
    assert "5 malformed (first: record 1: ValueError: 'image'" in said and "2 without a picture (first: gone" in said


@pytest.mark.parametrize("content, problem", [
    ("[{", "val.json: Expecting"), ([1, 2], "val.json"), (None, "No such file"), ([], "left out: nothing"),
    ([TEXTVQA | {"answers": []}], "no answer"), ([TEXTVQA], "train_images/003a.jpg")])
def test_a_file_without_a_usable_question_changes_nothing(tmp_path, capsys, content, problem):
    file, out = tmp_path / "val.json", save(tmp_path / "out/q.jsonl", "what was here before")
    if content is not None:
        save(file, content)
    assert problem in refusal(capsys, benchmarks, "textvqa", file, "--out", out)
    assert "overwritten" in refusal(capsys, benchmarks, "textvqa", out, "--out", out)
    assert out.read_text() == "what was here before"


def test_a_damaged_parquet_file_is_one_line(tmp_path, capsys):
    cut = save(tmp_path / "a.parquet", hub_file(tmp_path / "test.parquet", CHART).read_bytes()[:-9])
    assert "a.parquet: Parquet" in refusal(capsys, benchmarks, "chartqa", cut, "--out", tmp_path / "q.jsonl")


# ---- llava_mix ---------------------------------------------------------------------------------------------------

def record(image, *turns):
    turns = turns or ("<image>\nWhat?", "It.")
    talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": 7, "image": image, "conversations": talk}


MIX = [
    record("coco/train2017/gqa.jpg"),
    record("gqa/images/1.jpg", f"<image>\nAre there scarves?{SHORT}", "Yes", "What is left of the man?", "car"),
    record("ocr_vqa/images/2.jpg", f"Who?{SHORT}\n<image>", ""),
    {"id": "t", "conversations": []}, record("textvqa/train_images/3.jpg"),               # of other sources, too
    record("gqa/images/1.jpg", "<image>\nSame image?", "Same"),                           # stays
    record("gqa/images/gone.jpg"), record("/gqa/images/1.jpg"), record("gqa/\udfff.jpg"),
    record("gqa/images/1.jpg", "<image>\nUnanswered?"),                                   # from here malformed
    record("gqa/images/1.jpg", "<image>\n", "Nothing asked"), {"id": 12, "image": "gqa/images/1.jpg"},
    record(["gqa/images/1.jpg"]), "not a record", record("gqa/../gqa/images/1.jpg"),
    record("gqa/images/1.jpg", "<image>\nHalf \ud800?", "It."),
]


def test_llava_mix(tmp_path, capsys):
    root = tmp_path / "my_gqa_data"   # its own name must not matter
    for image in ("coco/train2017/gqa.jpg", "textvqa/train_images/3.jpg", "gqa/images/1.jpg", "ocr_vqa/images/2.jpg"):
        save(root / image, png())
    text = "\ufeff" + json.dumps(MIX, indent=1).replace("\n", "\r\n")   # as a Windows editor would save it
    mix = save(tmp_path / "mix.json", text), "--images", root
    folder, found = convert(llava_mix, tmp_path / "q.jsonl", *mix)
    assert folder == root and {q["image"] for q in found} == {"gqa/images/1.jpg", "ocr_vqa/images/2.jpg"}
    assert [(q["id"], q["kind"], q["question"], q["answers"]) for q in found] == [
        ("1", "gqa", ["Are there scarves?" + SHORT], ["Yes"]), ("2", "ocr_vqa", ["Who?" + SHORT], [""]),
        ("5", "gqa", ["Same image?"], ["Same"])]
    said = capsys.readouterr()
    assert "gqa            2 kept of about 72,140\nocr_vqa        1 kept" in said.out
    for reason in ("4 of other sources", "6 malformed (first: record 9:", "3 without a picture (first: gqa/images/go"):
        assert reason in said.err
    first = convert(llava_mix, tmp_path / "q.jsonl", *mix, "--all-turns")[1][0]
    assert first["question"] == ["Are there scarves?" + SHORT, "What is left of the man?"]
    assert first["answers"] == ["car"]   # of the last turn, the one that is scored


@pytest.mark.parametrize("content, problem", [
    ("[{", "mix.json: Expecting"), ("5", "mix.json"), ([], "no question can be used"), (MIX[6:7], "gone.jpg")])
def test_llava_mix_refuses_a_file_without_a_usable_question(capsys, tmp_path, content, problem):
    file, out = save(tmp_path / "mix.json", content), tmp_path / "out.jsonl"
    assert problem in refusal(capsys, llava_mix, file, "--images", tmp_path, "--out", out) and not out.exists()
    assert "overwritten" in refusal(capsys, llava_mix, file, "--images", tmp_path, "--out", file)
