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


def png(shade=0):
    file = io.BytesIO()
    Image.new("L", (4, 3), shade).save(file, "png")
    return file.getvalue()


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
    assert not [benchmark.hub for benchmark in benchmarks.BENCHMARKS.values() if benchmark.hub not in text]


# ---- metrics -----------------------------------------------------------------------------------------------------

NORMALISED = {
    "The Coca-Cola": "coca cola", "12,345": "12345", "U.S.A.": "usa", "3.": "3", "3.5": "3.5", "$5.00": "$5.00",
    "Jack Daniel's": "jack daniel 's", "none": "0", "a b-c": "b c", "dont": "don't", "-5": "5", "7-up": "7 up",
    "Route 66.": "route 66", "50%": "50%", "10:30 am": "10:30 am", "A": "", "Ten\tred\ncars!": "10 red cars",
    "somebody'd": "somebodyd", "couldn'tve": "couldn't've", "couldntve": "couldntve", "yall'll": "y'all'll",
    "." * 40 + "x": "." * 8 + "x"}   # at most 32 full stops go


@pytest.mark.parametrize("text", NORMALISED)
def test_vqa_normaliser(text):
    assert metrics.normalise(text) == NORMALISED[text]


def test_contractions_are_the_known_number():
    one = [word for word in metrics.CONTRACTIONS.values() if word.count("'") == 1]
    assert len(one) == 73   # 75 in the harness, of which I'm and I've can never match


@pytest.mark.parametrize("matching, want", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_out(matching, want):
    assert metrics.vqa_accuracy("Dogs.", ["dogs"] * matching + ["cat"] * (10 - matching)) == pytest.approx(want)


@pytest.mark.parametrize("prediction, answers, want", [
    ("hello", ["Hello"], 1), (" Hello\n", ["hello"], 1), ("ab", ["abcd"], 0.5), ("abc", ["abcdefg"], 0),
    ("helo", ["world", "hello"], 0.8), ("", [""], 1), ("", ["a"], 0), ("a  b", ["a b"], 1),
    ("a b", ["a  c"], 0.75),    # one edit in "a c", over the 4 letters of the raw "a  c"
    ("a", ["\u00df"], 0.5), ("Hauptstr", ["Hauptstra\u00dfe"], 0.75),   # sharp s counts as SS, two letters
    (" s", [" ", "an yes. hello?"], 0.5)])   # one edit from "" to "s", over the 2 letters of the raw " s"
def test_anls(prediction, answers, want):
    assert metrics.anls(prediction, answers) == pytest.approx(want)


@pytest.mark.parametrize("want, pairs", [
    (1, ["10.4 10", "10.5 10", "0 0", "YES Yes", "10% 0.1", "2014 2000", "-10 -10.2"]),
    (0, ["10.6 10", "0.0 0", "1,000 1000", "Yes. Yes", "10 10%", "ten 10"])])
def test_relaxed_accuracy(want, pairs):
    assert {metrics.relaxed_accuracy(*pair.split()) for pair in pairs} == {want}
    assert metrics.relaxed_accuracy(" Yes", "Yes") == 0   # nothing is stripped


@pytest.mark.parametrize("prediction, answers, dataset, want", [
    ("The word is centre.", ["CENTRE"], "IIIT5K", 1), ("CENTER", ["CENTRE"], "IIIT5K", 0),
    ("two\nlines", ["Two Lines"], "IAM", 1), ("two lines", ["Two\nLines"], "IAM", 1), ("t wo", ["two"], "IAM", 0),
    ("so 4", ["5", "4"], "IAM", 1), ("x ^ 2\n+ 1", ["x^2 + 1"], "HME100k", 1), ("A + B", ["a+b"], "HME100k", 1),
    ("A + B", ["A+B"], "HME100k", 0)])
def test_ocrbench(prediction, answers, dataset, want):
    assert metrics.ocrbench(prediction, answers, dataset) == want


LETTERS = {
    "C": "C", " b": "B", "Cotton": "C", "Blue": "B", "Answer: D": "A", "and B": "A", "(D) red": "D",
    "The answer is D": "D", "The answer is blue": "B", "Option: C": "C", "It is (b), not C": "B", "I pick B]": "B",
    "It is C": "C", "Not b. but (c)": "C", "I see C and a cat": "C", "It was blue": None, "kevlar": "A",
    "it is so": None, "": None}
HR_LETTERS = {
    "A": "A", "(B)": "B", "A dog": "A", "a": None, "Blue": "B", "light blue": None, "A B": None, "A or B: red": "A",
    "Z": "Z", "Cannot determine the answer.": "Z", "green": None, "": None}


def test_letters_of_replies():
    assert {reply: metrics.choice_letter(reply) for reply in LETTERS} == LETTERS
    options = {"A": "red", "B": "blue", "C": "light blue"}
    assert {reply: metrics.hr_letter(reply, options) for reply in HR_LETTERS} == HR_LETTERS


@pytest.mark.parametrize("metric, answers, prediction, want", [
    ("exact", ["Red"], " red\n", 1), ("exact", [], "", None), ("vqa", ["two"] * 10, "2", 1),
    ("anls", ["ab"], "a", 0.5), ("relaxed", ["5", "10"], "10.4", 1), ("ocrbench", ["B"], "B", 0),
    ("letter", ["A", "b"], "Blue", 1), ("hr", ["A"], "it is red", 1), ("hr", ["A"], "neither", 0),
    ("pope", ["yes"], "Yes", 1), ("pope", ["yes"], "Yes.", 0)])
def test_score_finds_the_metric(metric, answers, prediction, want):
    more = {"dataset": "HME100k", "options": {"A": "red", "B": "blue"}}
    assert metrics.score({"metric": metric, "answers": answers} | more, prediction) == want


def test_overlap_is_by_exact_areas():
    whole = [(0, 0, 100, 100)], (100, 100)
    assert metrics.overlap([(0, 0, 50, 100), (0, 0, 50, 50)], *whole) == (True, 0.5)   # overlapping crops
    assert metrics.overlap([(0, 0, 49, 100)], *whole) == (False, 0.49) and metrics.overlap([], *whole) == (False, 0)
    assert metrics.overlap([(0, 0, 50, 50)], [(-9, -9, 50, 50)], (100, 100)) == (True, 1)   # sticks out
    for x in range(0, 60, 7):   # a tenth of a cell of the raster of 256 x 256 that once decided this
        assert metrics.overlap([(x, 5, x + 5, 15)], [(x, 5, x + 10, 15)], (7680, 4320)) == (True, 0.5)
        assert metrics.overlap([(x + 10, 5, x + 90, 15)], [(x, 5, x + 10, 15)], (7680, 4320)) == (False, 0)
    with pytest.raises(BadInput, match=r"\(500, 0, 600, 50\) lies outside the picture of 100x100"):
        metrics.overlap([(0, 0, 9, 9)], [(500, 0, 600, 50)], (100, 100))


def test_paired_scores():
    found = metrics.paired([0, 1, 1, 0.5, None], [1, 0, 1, 1, 1])
    assert (found["won"], found["lost"], found["change"]) == (2, 1, 0.125)
    assert found["interval"] == pytest.approx(1.96 * math.sqrt(2.1875 / 3) / 2)   # the squares of .875 1.125 .125 .375
    assert math.isnan(metrics.paired([0], [1])["interval"])


# ---- tables ------------------------------------------------------------------------------------------------------

LLAVA_7B = SimpleNamespace(model_type="llava", num_hidden_layers=32, hidden_size=4096)


def answered(metric, kinds, plain, two=()):
    """Rows of an evaluation: the answers of each question, plain and two-stage, where "yes" or A is right."""
    want = "yes" if metric == "pope" else "A"
    rows = [{"kind": kind, "cycle": str(n % 2), "answers": [want]} for n, kind in enumerate(kinds)]
    for name, replies in (("plain", plain), ("two_stage", two)):
        for row, reply in zip(rows, replies):
            row[name] = {"answer": reply, "score": float(reply.lower() == want.lower()), "seconds": 1.0,
                         "boxes": [[0, 0, 1, 1]], "visual_tokens": 600}
    return rows


def logged(rows, config=None, questions=None, **question):
    """-> (lines that side_by_side logs, its summary)."""
    lines = []
    summary = metrics.side_by_side(rows, questions or [question] * len(rows), lines.append, config)
    return [" ".join(line.split()) for line in lines], summary


def test_official_scores_of_pope():
    rows = answered("pope", ["random"] * 4, ["yes", "no", "no", "maybe"], ["yes", "Yes", "no", "yes"])
    lines, summary = logged(rows, LLAVA_7B, metric="pope", benchmark="pope")
    assert lines[0] == "kind n plain two-stage s plain s two tokens RoI % change \u00b1 lost won"
    assert lines[1] == "random 4 25.0 75.0 1.000 1.000 600 100 +50.0 56.6 0 2" and lines[2][3:] == lines[1][6:]
    assert lines[-5:] == ["official, 4 questions plain two_stage the paper's, LLaVA-1.5-7B",
                          "F1 50.0 85.7 85.9 -> 87.1",          # 2 * 1 / (2 * 1 + 2), and 2 * 3 / (2 * 3 + 1)
                          "accuracy 25.0 75.0 - -> 87.8", "precision 100.0 100.0", "recall 33.3 75.0"]
    assert summary == {"plain": 50.0, "two_stage": 85.71, "questions": 4, "metric": "pope", "official": {
        "plain": {"F1": 50.0, "accuracy": 25.0, "precision": 100.0, "recall": 33.33},
        "two_stage": {"F1": 85.71, "accuracy": 75.0, "precision": 100.0, "recall": 75.0}}}


def test_official_scores_of_hr_bench_are_means_over_rotations():
    rows = answered("hr", ["single", "single", "cross", "cross", "single"], list("AABAB"))
    lines, summary = logged(rows, LLAVA_7B, metric="hr", benchmark="hrbench8k")
    assert lines[-4:] == ["official, 5 questions plain the paper's, LLaVA-1.5-7B", "average 66.7 33.8 -> 39.1",
                          "FSP 75.0 - -> 46.5", "FCP 50.0 - -> 31.8"]   # FSP: 1 of 2 in rotation 0, 1 of 1 in 1
    assert summary["plain"] == 66.67 and summary["official"]["plain"]["FCP"] == 50


def test_official_scores_of_ocrbench_are_points():
    kinds = ["Handwriting Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    lines, summary = logged(answered("ocrbench", kinds, "AAA"), LLAVA_7B, metric="ocrbench", benchmark="ocrbench")
    assert lines[-7:-3] == ["mean 100.0", "points 3.0 314 -> 370", "Text Recognition 2.0", "Scene Text-centric VQA 0.0"]
    assert summary["plain"] == 100 and summary["questions"] == 3


def test_the_papers_figures_stand_beside_their_own_model_alone():
    rows = answered("letter", ["direct_attributes", "relative_position"], "AB")
    small = SimpleNamespace(model_type="llava", num_hidden_layers=32, hidden_size=128)
    lines, _ = logged(rows, small, metric="letter", benchmark="vstar")
    assert lines[-4:] == ["official, 2 questions plain", "mean 50.0", "direct_attributes 100.0",
                          "relative_position 0.0"]
    qwen = SimpleNamespace(model_type="qwen2_5_vl", num_hidden_layers=28, hidden_size=3584)
    lines, _ = logged(rows, qwen, metric="letter", benchmark="vstar")
    assert lines[-4:-2] == ["official, 2 questions plain the paper's, Qwen2.5-VL-7B", "mean 50.0 78.0 -> 89.5"]
    lines, summary = logged(rows, LLAVA_7B, [{"metric": "pope", "benchmark": "pope"}, {}])
    assert not any("official" in line for line in lines) and summary["plain"] == 50 and summary["metric"] is None
    figures = {name for model in json.loads(metrics.PAPER.read_text()).values() for name in model}
    assert figures == {"name", *benchmarks.BENCHMARKS}


def test_questions_without_answers_count_for_times_alone():
    rows = answered("exact", ["word", "word", "all"], "AAB")
    rows[1]["plain"]["score"] = None
    lines, summary = logged(rows)
    assert lines == ["kind n plain s plain", "word 2 100.0 1.000", "all 3 50.0 1.000",
                     "1 of 3 questions have no answers: not scored"]
    assert (summary["questions"], summary["scored"], summary["plain"]) == (3, 2, 50)
    rows = answered("exact", ["word", "word", "all"], "AAB", "AAB")
    for row in rows:
        del row["plain"]["score"], row["two_stage"]["score"]
    lines, summary = logged(rows)
    assert lines[0] == "kind n s plain s two tokens RoI %"
    assert summary == {"questions": 3, "metric": "exact", "scored": 0}


def test_localisation_is_a_mean_over_the_questions_with_boxes():
    rows = answered("exact", ["a", "b", "b"], "AAA", "AAA")
    rows[1]["two_stage"] |= {"covers": True, "iou": 0.5}
    lines, _ = logged(rows)
    assert lines[0].split()[-8:-3] == ["recall", "IoU", "RoI", "%", "change"]
    assert [line.split()[7:9] for line in lines[1:4]] == [["-", "-"], ["100.0", "0.50"], ["100.0", "0.50"]]


def test_compare_is_a_table_of_kinds():
    asked = [(None, {"kind": kind, "answers": ["a"]}) for kind in ("word", "red\x1b[2J", "word")]
    lines = metrics.compare(asked, {"plain": lambda picture, q: "a", "none": lambda picture, q: ""}).split("\n")
    assert lines[0].split() == ["word", r"red\x1b[2J", "all", "s/question"]
    assert [line.split()[:4] for line in lines[1:]] == [["plain"] + 3 * ["100.0"], ["none"] + 3 * ["0.0"]]


# ---- question files ----------------------------------------------------------------------------------------------

ASKED = {"image": "a.png", "question": "Why?"}


def test_a_question_file_is_read(tmp_path):
    more = {"question": ["What?", "Why?"], "answers": ["A"], "boxes": [[-1, 0.5, 3, 4]], "kind": None}
    lines = ['\ufeff{"images": "pictures"}', "", json.dumps(ASKED), json.dumps(ASKED | more | {"extra": 1}), ""]
    path = save(tmp_path / "q.jsonl", "\r\n".join(lines))
    (first, second), root = questions.read_questions(path)
    assert root == tmp_path / "pictures" and questions.read_questions(path, tmp_path)[1] == tmp_path
    assert first == {"image": "a.png", "question": ["Why?"], "line": 3}
    assert second["question"] == ["What?", "Why?"] and "kind" not in second and second["line"] == 4


@pytest.mark.parametrize("change", [
    {"question": [" "]}, {"question": 5}, {"image": None}, {"image": "/a.png"}, {"image": "a/../../b.png"},
    {"answers": "yes"}, {"metric": "length"}, {"options": {"A": 5}}, {"max_new_tokens": True}, {"tau": 15},
    {"kind": "\udfff"}, {"boxes": [[1, 2, 3]]}, {"boxes": [[5, 2, 3, 4]]}, {"boxes": [[1, 2, 1, 4]]},
    {"boxes": [[1, 2, math.nan, 4]]}])
def test_a_bad_field_is_refused_with_its_line(tmp_path, change):
    path = save(tmp_path / "q.jsonl", "\n".join(map(json.dumps, (ASKED, ASKED | change))))
    with pytest.raises(BadInput, match="q.jsonl line 2: .*README.md"):
        questions.read_questions(path)


@pytest.mark.parametrize("text, says", [
    ('{"image": ', "line 1: "), ("[1]", "line 1: "), ("[" * 9999, "line 1: "), (b"\xff\xfe\x00", "utf-8"),
    ("", "holds no question"), (None, "No such file")])
def test_a_damaged_question_file_is_one_line(tmp_path, text, says):
    path = tmp_path / "q.jsonl"
    if text is not None:
        save(path, text)
    with pytest.raises(BadInput, match=f"q.jsonl.*{says}"):
        questions.read_questions(path)


@pytest.mark.parametrize("metric, answers", [
    ("exact", ['["stop", "halt"]']), ("exact", ["['stop']"]), ("vqa", ["red"]), ("relaxed", ["nan"]),
    ("relaxed", [" Yes"]), ("letter", ["(A)"]), ("letter", ["A", "E"]), ("letter", ["D"]), ("hr", ["C"]),
    ("hr", ["red"]), ("hr", ["Z"]), ("pope", ["Yes."]), ("ocrbench", [" "])])
def test_an_answer_that_no_reply_or_every_reply_matches_is_refused(tmp_path, metric, answers):
    q = ASKED | {"metric": metric, "answers": answers, "options": {"A": "red", "B": "blue"}}
    with pytest.raises(BadInput, match="q.jsonl line 1: .*answer"):
        questions.read_questions(save(tmp_path / "q.jsonl", q))


@pytest.mark.parametrize("metric, answers", [
    ("exact", [""]), ("vqa", ["A"] * 10), ("anls", [""]), ("relaxed", ["0"]), ("letter", [" b"]), ("hr", ["a"]),
    ("pope", ["No"]), ("ocrbench", ["A+B"]), ("relaxed", ["[2011, 2012]", "[Austria, Chile]"])])   # ChartQA's
def test_answers_of_the_benchmarks_are_read(tmp_path, metric, answers):
    q = ASKED | {"metric": metric, "answers": answers, "dataset": "HME100k", "options": {"A": "red", "B": "blue"}}
    assert questions.read_questions(save(tmp_path / "q.jsonl", q))[0][0]["answers"] == answers


def test_a_metric_is_added_in_one_place(monkeypatch):
    rule = metrics.Metric(lambda prediction, answers: float(len(prediction) == len(answers[0])))
    monkeypatch.setitem(metrics.METRICS, "length", rule)
    q = questions.check_question(ASKED | {"answers": ["ab"], "metric": "length"})
    assert [metrics.score(q, reply) for reply in ("xy", "xyz")] == [1, 0]
    assert rule.official([{"score": 1.0}]) == {"mean": 100}


# ---- benchmarks --------------------------------------------------------------------------------------------------

TEXTVQA = {"image_id": "003a", "question_id": 34602, "question": "What does the NASA sign say?", "answers": ["no"] * 10}
DOCVQA = {"questionId": 337, "question": "What is the Date?", "answers": ["1/8/93", "1993"]}
CHART = {"imgname": "1.png", "query": "How many bars?", "label": 0}
OCR = {"dataset_name": "IIIT5K", "image_path": "1.png", "question": " what is written? ", "answers": "CENTRE",
       "type": "Regular Text Recognition"}
GLOVE = {"question_id": 0, "image": "sa_1.png", "category": "direct_attributes", "label": "A",
         "text": "What is the material of the glove (left)?\n(A) rubber\n(B) cotton" + LETTER}
POPE = {"question_id": 1, "image": "1.png", "label": "yes", "text": "Is there a snowboard\u2028?"}   # a line separator
HR = {"index": 0, "question": "How many? ", "answer": "A", "category": "single", "A": 0, "B": '"dark"\tblue',
      "C": None, "D": math.nan, "cycle_category": "0", "image": base64.b64encode(png()).decode()}


def tsv(*rows):
    file = io.StringIO()
    table = csv.DictWriter(file, rows[0], delimiter="\t")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


CASES = {   # name: (official files, where its picture is, the hub's row, the question)
    "textvqa": ({"val.json": {"data": [TEXTVQA]}}, "train_images/003a.jpg", TEXTVQA, dict(
        id="34602", question="What does the nasa sign say?" + SHORT, answers=["no"] * 10,
        metric="vqa", max_new_tokens=1024)),
    "docvqa": ({"val.json": b"\xef\xbb\xbf" + json.dumps({"data": [DOCVQA | {"image": "documents/a.png"}]}).encode()},
               "documents/a.png", DOCVQA, dict(
        id="337", question="What is the Date?" + SHORT, answers=["1/8/93", "1993"], metric="anls", max_new_tokens=32)),
    "infovqa": ({"val.json": {"data": [DOCVQA | {"image_local_name": "2.jpeg"}]}}, "infographicsvqa_images/2.jpeg",
                DOCVQA, dict(id="337", question="What is the Date?" + SHORT, answers=["1/8/93", "1993"],
                             metric="anls", max_new_tokens=32)),
    "chartqa": ({"test_human.json": [CHART]}, "png/1.png",
                {"type": "human_test", "question": "How many bars?", "answer": "0"}, dict(
        id="human-0", kind="human", question="How many bars?\nAnswer the question with a single word.", answers=["0"],
        metric="relaxed", max_new_tokens=16)),
    "ocrbench": ({"OCRBench.json": [OCR]}, "OCRBench_Images/1.png",
                 {"dataset": "IIIT5K", "question": "what is written?", "question_type": OCR["type"],
                  "answer": ["CENTRE"]}, dict(
        id="Regular Text Recognition-0", kind="Regular Text Recognition", dataset="IIIT5K", question="what is written?",
        answers=["CENTRE"], metric="ocrbench", max_new_tokens=128)),
    "vstar": ({"test_questions.jsonl": json.dumps(GLOVE) + "\r\n\r\n"}, "sa_1.png", GLOVE, dict(
        id="0", kind="direct_attributes", answers=["A"], metric="letter", max_new_tokens=16,
        question="What is the material of the glove (left)?\nA. rubber\nB. cotton" + 2 * LETTER)),
    "pope": ({"coco_pope_random.json": json.dumps(POPE, ensure_ascii=False) + "\n"}, "val2014/1.png",
             {"question_id": 1, "category": "random", "question": POPE["text"], "answer": "yes"}, dict(
        id="random-1", kind="random", question="Is there a snowboard\u2028?" + SHORT, answers=["yes"],
        metric="pope", max_new_tokens=128)),
    "hrbench4k": ({"hr_bench_4k.tsv": tsv(HR)}, "unpacked", HR | {"A": "0"}, dict(
        id="0", kind="single", cycle="0", answers=["A"], options={"A": "0", "B": '"dark"\tblue'},
        question='How many?\nA. 0\nB. "dark"\tblue\nAnswer the option letter directly.',
        metric="hr", max_new_tokens=1024)),
}


def convert(tmp_path, name, *files, images=None):
    """Run the command -> root named by the first line, questions."""
    out = tmp_path / "out" / f"{name}.jsonl"
    benchmarks.main([name, *map(str, files), "--out", str(out)] + (["--images", str(images)] if images else []))
    first, *found = map(json.loads, out.read_text().splitlines())
    assert all((Path(first["images"]) / q["image"]).is_file() for q in found)
    assert len(questions.read_questions(out)[0]) == len(found)
    return Path(first["images"]), found


@pytest.mark.parametrize("name", CASES)
def test_questions_of_the_official_files(tmp_path, capsys, name):
    files, picture, _, want = CASES[name]
    save(tmp_path / picture, png())
    files = [save(tmp_path / file, content) for file, content in files.items()]
    root, found = convert(tmp_path, name, *files)
    image = found[0].pop("image")
    assert found == [want | {"benchmark": name}]
    assert picture in ("unpacked", image) and (root / image).read_bytes() == png()
    said = capsys.readouterr()
    assert "infer.py --eval" in said.out and f"{benchmarks.BENCHMARKS[name].count} questions" in said.err


def hub_file(path, *rows):
    """A parquet file as the hub has them, pictures as {"bytes", "path"}."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": png(), "path": None}} | row for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_hubs_files_give_the_same_questions(tmp_path, name):
    *_, row, want = CASES[name]
    if name == "vstar":
        row = {key: value for key, value in row.items() if key != "image"}
    split = benchmarks.BENCHMARKS[name].split
    hub_file(tmp_path / f"hub/data/{split}-00000-of-00002.parquet", row)
    hub_file(tmp_path / "hub/data/elsewhere.parquet", row)
    hub_file(tmp_path / f"hub/{benchmarks.BENCHMARKS[name].other}".replace("\0", "x") / f"{split}.parquet.lock", row)
    root, found = convert(tmp_path, name, tmp_path / "hub")
    assert (root / found[0].pop("image")).read_bytes() == png() and root.name == f"{name}_images"
    assert found == [want | {"benchmark": name}]


def test_a_folder_stands_for_one_split(tmp_path):
    names = ("DocVQA/validation-0.parquet", "DocVQA/test-0.parquet", "InfographicVQA/validation-0.parquet")
    files = [save(tmp_path / "DocVQA" / name, "") for name in names]
    assert benchmarks.files_of("docvqa", [tmp_path / "DocVQA"]) == files[:1]
    assert benchmarks.files_of("infovqa", [tmp_path / "DocVQA"]) == files[2:]


def test_several_files_and_pictures_in_common(tmp_path):
    save(tmp_path / "png/1.png", png())
    files = [save(tmp_path / f"test_{kind}.json", [CHART, CHART]) for kind in ("human", "augmented")]
    _, found = convert(tmp_path, "chartqa", *files, images=tmp_path / "png")
    assert [q["id"] for q in found] == ["human-0", "human-1", "augmented-0", "augmented-1"]
    assert {q["image"] for q in found} == {"1.png"}
    root, found = convert(tmp_path, "hrbench4k", save(tmp_path / "hr.tsv", tsv(HR, HR)))
    assert len(found) == 2 and len(list(root.iterdir())) == 1   # a picture is unpacked once


def test_vstar_prompts_are_the_harness_own(tmp_path):
    """An option with a bracket is lost, as in the harness; one without options stays as it is."""
    text = benchmarks.vstar(GLOVE | {"text": "Dog?\n(A) red (dark)\n(B) blue"})["question"]
    assert text == "Dog?\nA. blue" + LETTER
    assert benchmarks.vstar(GLOVE | {"text": " Dog? "})["question"] == " Dog? " + LETTER
    save(tmp_path / "sa_1.png", png())
    save(tmp_path / "sa_1.json", {"target_object": ["glove"], "bbox": [[1682, 1175, 28, 31]]})
    _, found = convert(tmp_path, "vstar", save(tmp_path / "q.jsonl", GLOVE))
    assert found[0]["boxes"] == [[1682, 1175, 1710, 1206]]


@pytest.mark.parametrize("change, reason", [
    ({"image": "/etc/hostname"}, "malformed"), ({"image": "../here/sa_1.png"}, "malformed"),
    ({"text": "half \ud800"}, "malformed"), ({"label": "(A)"}, "malformed"), ({"label": math.nan}, "no answer"),
    ({"image": "gone.png"}, "without a picture")])
def test_a_record_that_can_not_be_used_is_left_out_and_counted(tmp_path, capsys, change, reason):
    save(tmp_path / "here/sa_1.png", png())
    file = save(tmp_path / "here/q.jsonl", "\n".join(map(json.dumps, (GLOVE, GLOVE | change))))
    assert len(convert(tmp_path, "vstar", file)[1]) == 1
    said = capsys.readouterr().err
    assert "left out: 1 " in said and reason in said


@pytest.mark.parametrize("content, problem", [
    ("[{", "val.json: Expecting"), (b"\xff", "utf-8"), ([1, 2], "val.json"), ([], "none there"), ([{}], "question_id"),
    ([TEXTVQA | {"answers": []}], "no answer"), ([TEXTVQA], "train_images/003a.jpg"), (None, "No such file")])
def test_a_file_without_a_usable_question_changes_nothing(tmp_path, capsys, content, problem):
    file, out = tmp_path / "val.json", save(tmp_path / "out/q.jsonl", "what was here before")
    if content is not None:
        save(file, content)
    message = refusal(capsys, benchmarks, "textvqa", file, "--out", out)
    assert problem in message and "TextVQA_0.5.1_val.json" in message and out.read_text() == "what was here before"
    assert "overwritten" in refusal(capsys, benchmarks, "textvqa", out, "--out", out)


def test_parquet_files_that_can_not_be_read(tmp_path, capsys):
    row = {"type": "human_test", "question": "How many?", "answer": "14"}
    cut = save(tmp_path / "a.parquet", hub_file(tmp_path / "test.parquet", row).read_bytes()[:-9])
    bad = hub_file(tmp_path / "b.parquet", row | {"image": {"bytes": b"GIF8", "path": None}})
    for file, problem in ((cut, "a.parquet: Parquet"), (bad, "UnidentifiedImageError")):
        assert problem in refusal(capsys, benchmarks, "chartqa", file, "--out", tmp_path / "q.jsonl")


# ---- llava_mix ---------------------------------------------------------------------------------------------------

def talk(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def record(image, *turns):
    return {"id": 7, "image": image, "conversations": talk(*(turns or ("<image>\nWhat?", "It.")))}


MIX = [
    record("coco/train2017/gqa.jpg"),
    record("gqa/images/1.jpg", f"<image>\nAre there scarves?{SHORT}", "Yes", "What is left of the man?", "car"),
    record("ocr_vqa/images/2.jpg", f"Who?{SHORT}\n<image>", "Ann"),
    {"id": "t", "conversations": talk("Tell me about gqa.", "No.")},                                  # text only
    record("textvqa/train_images/3.jpg"),
    record("gqa/images/1.jpg", "<image>\nSame image?", "Same"),                                      # stays, too
    record("gqa/images/gone.jpg"), record("gqa/images/empty.jpg"),
    record("ocr_vqa/images/1437717772.jpg"),                                                          # known, broken
    record("ocr_vqa/images/51WYdiyqywL.jpg", "<image>\nRepaired?", ""),                               # known, repaired
    record("gqa/images/1.jpg", "<image>\nUnanswered?"),                                 # from here malformed
    record("gqa/images/1.jpg", "<image>\n", "Nothing asked"), {"id": 12, "image": "gqa/images/1.jpg"},
    record(["gqa/images/1.jpg"]), "not a record", record("/gqa/images/1.jpg"), record("gqa/../gqa/images/1.jpg"),
    record("gqa/images/1.jpg", "<image>\nHalf \ud800?", "It."), record("gqa/\udfff.jpg"),
]


@pytest.fixture
def mix(tmp_path):
    """-> run(*arguments): questions of MIX. The folder's own name holds "gqa", which must not matter."""
    root = tmp_path / "my_gqa_data"
    for name in ("coco/train2017/gqa.jpg", "textvqa/train_images/3.jpg", "gqa/images/1.jpg", "ocr_vqa/images/2.jpg",
                 "ocr_vqa/images/51WYdiyqywL.jpg"):
        save(root / name, png())
    save(root / "gqa/images/empty.jpg", b"")
    save(root / "ocr_vqa/images/1437717772.jpg", png()[:40])

    def run(*arguments):
        out = tmp_path / "mix.jsonl"
        text = "\ufeff" + json.dumps(MIX, indent=1).replace("\n", "\r\n")   # as a Windows editor would save it
        llava_mix.main([str(save(tmp_path / "mix.json", text)), "--images", str(root), "--out", str(out), *arguments])
        first, *found = map(json.loads, out.read_text().splitlines())
        assert first == {"images": str(root)} and len(questions.read_questions(out)[0]) == len(found)
        return found
    return run


def test_llava_mix_takes_first_questions(mix, capsys):
    assert mix() == [
        dict(id="1", kind="gqa", image="gqa/images/1.jpg", question="Are there scarves?" + SHORT, answers=["Yes"]),
        dict(id="2", kind="ocr_vqa", image="ocr_vqa/images/2.jpg", question="Who?" + SHORT, answers=["Ann"]),
        dict(id="5", kind="gqa", image="gqa/images/1.jpg", question="Same image?", answers=["Same"]),
        dict(id="9", kind="ocr_vqa", image="ocr_vqa/images/51WYdiyqywL.jpg", question="Repaired?", answers=[""])]
    said = capsys.readouterr()
    assert said.out.startswith("gqa            2 kept of about 72,140\nocr_vqa        2 kept")
    for reason in ("2 of other sources", "1 text only", "9 malformed (first: record 10:",
                   "3 without a usable picture (first: gqa/images/gone.jpg)"):
        assert reason in said.err


def test_llava_mix_keeps_conversations(mix):
    first = mix("--all-turns")[0]
    assert first["question"] == ["Are there scarves?" + SHORT, "What is left of the man?"]
    assert first["answers"] == ["car"]   # of the last turn, the one that is scored


@pytest.mark.parametrize("content, problem", [
    ("[{", "mix.json: Expecting"), ("5", "mix.json"), ({"data": []}, "1 malformed"), ([], "no question can be used"),
    (MIX[:1], "1 of other sources"), (MIX[6:7], "gone.jpg")])
def test_llava_mix_refuses_a_file_without_a_usable_question(capsys, tmp_path, content, problem):
    file, out = save(tmp_path / "mix.json", content), tmp_path / "out.jsonl"
    assert problem in refusal(capsys, llava_mix, file, "--images", tmp_path, "--out", out) and not out.exists()
    assert "overwritten" in refusal(capsys, llava_mix, file, "--images", tmp_path, "--out", file)
