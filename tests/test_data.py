"""Scores and question files: golden values of the common harness, and miniatures of every original file.

    python -m pytest tests/test_data.py      # 3 seconds, no network, no model
"""
import base64
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip import BadInput  # noqa: E402
from data import benchmarks, llava_mix, metrics, questions  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_the_readme_names_every_field_metric_and_benchmark():
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    names = {*questions.CHECKS, *metrics.METRICS, *benchmarks.BENCHMARKS}
    assert not [name for name in names if f"`{name}`" not in text]
    assert not [benchmark.hub for benchmark in benchmarks.BENCHMARKS.values() if benchmark.hub not in text]


# ---- metrics -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, same_as", [
    ("The Coca-Cola", "coca cola"), ("12,345", "12345"), ("U.S.A.", "usa"), ("3.", "3"), ("3.5", "3.5"),
    ("$5.00", "$5.00"), ("Jack Daniel's", "jack daniel 's"), ("none", "0"), ("a b-c", "b c"), ("dont", "don't"),
    ("-5", "5"), ("7-up", "7 up"), ("Route 66.", "route 66"), ("50%", "50%"), ("10:30 am", "10:30 am"), ("A", ""),
    ("Ten\tred\ncars!", "10 red cars"), ("its", "its"), ("shes", "shes"), ("somebody'd", "somebodyd"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("couldntve", "couldntve"), ("yall'll", "y'all'll"),
    ("." * 40 + "x", "." * 8 + "x")])   # at most 32 full stops go
def test_vqa_normaliser(text, same_as):
    assert metrics.normalise(text) == same_as


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
    (" s", [" ", "an yes. hello?"], 0.5)])   # one edit from "" to "s", over the 2 letters of the raw " s"
def test_anls(prediction, answers, want):
    assert metrics.anls(prediction, answers) == pytest.approx(want)


@pytest.mark.parametrize("prediction, answer, want", [
    ("10.4", "10", 1), ("10.6", "10", 0), ("10.5", "10", 1), ("0.0", "0", 0), ("0", "0", 1), ("1,000", "1000", 0),
    ("Yes.", "Yes", 0), ("YES", "Yes", 1), (" Yes", "Yes", 0), ("10%", "0.1", 1), ("10", "10%", 0), ("2014", "2000", 1),
    ("-10", "-10.2", 1), ("ten", "10", 0)])
def test_relaxed_accuracy(prediction, answer, want):
    assert metrics.relaxed_accuracy(prediction, answer) == want


@pytest.mark.parametrize("prediction, answers, dataset, want", [
    ("The word is centre.", ["CENTRE"], "IIIT5K", 1), ("CENTER", ["CENTRE"], "IIIT5K", 0),
    ("two\nlines", ["Two Lines"], "IAM", 1), ("two lines", ["Two\nLines"], "IAM", 1), ("t wo", ["two"], "IAM", 0),
    ("so 4", ["5", "4"], "IAM", 1), ("x ^ 2\n+ 1", ["x^2 + 1"], "HME100k", 1), ("A + B", ["a+b"], "HME100k", 1),
    ("A + B", ["A+B"], "HME100k", 0)])
def test_ocrbench(prediction, answers, dataset, want):
    assert metrics.ocrbench(prediction, answers, dataset) == want


@pytest.mark.parametrize("reply, letter", [
    ("C", "C"), (" b", "B"), ("Cotton", "C"), ("Blue", "B"), ("Answer: D", "A"), ("and B", "A"), ("(D) red", "D"),
    ("The answer is D", "D"), ("The answer is blue", "B"), ("Option: C", "C"), ("It is (b), not C", "B"),
    ("I pick B]", "B"), ("It is C", "C"), ("Not b. but (c)", "C"), ("I see C and a cat", "C"), ("It was blue", None),
    ("kevlar", "A"), ("it is so", None), ("", None)])
def test_choice_letter(reply, letter):
    assert metrics.choice_letter(reply) == letter


@pytest.mark.parametrize("reply, letter", [
    ("A", "A"), ("(B)", "B"), ("A dog", "A"), ("a", None), ("Blue", "B"), ("light blue", None), ("A B", None),
    ("A or B: red", "A"), ("Z", "Z"), ("Cannot determine the answer.", "Z"), ("green", None), ("", None)])
def test_hr_letter(reply, letter):
    assert metrics.hr_letter(reply, {"A": "red", "B": "blue", "C": "light blue"}) == letter


@pytest.mark.parametrize("question, prediction, want", [
    ({"answers": ["Red"]}, " red\n", 1), ({"answers": ["red"]}, "r", 0),
    ({"metric": "vqa", "answers": ["two"] * 10}, "2", 1), ({"metric": "anls", "answers": ["abcd"]}, "ab", 0.5),
    ({"metric": "relaxed", "answers": ["5", "10"]}, "10.4", 1),
    ({"metric": "ocrbench", "answers": ["B"], "dataset": "HME100k"}, "B", 0),
    ({"metric": "ocrbench", "answers": ["B"], "dataset": "IAM"}, "b", 1),
    ({"metric": "letter", "answers": ["C"]}, "Cotton", 1),
    ({"metric": "hr", "answers": ["A"], "options": {"A": "red", "B": "blue"}}, "it is red", 1),
    ({"metric": "hr", "answers": ["A"], "options": {"A": "red", "B": "blue"}}, "neither", 0),
    ({"metric": "pope", "answers": ["yes"]}, "Yes", 1), ({"metric": "pope", "answers": ["yes"]}, "Yes.", 0)])
def test_score_finds_the_metric(question, prediction, want):
    assert metrics.score(question, prediction) == want


def test_a_metric_is_added_in_one_place(tmp_path, monkeypatch):
    path = save(tmp_path / "q.jsonl", '{"image": "a.png", "question": "Why?", "answers": ["ab"], "metric": "length"}')
    with pytest.raises(BadInput, match="'metric' has a wrong type or value: length"):
        questions.read_questions(path)
    rule = metrics.Metric(lambda prediction, answers: float(len(prediction) == len(answers[0])))
    monkeypatch.setitem(metrics.METRICS, "length", rule)
    (q,), _ = questions.read_questions(path)
    assert [metrics.score(q, reply) for reply in ("xy", "xyz")] == [1, 0]
    assert rule.official([{"score": 1.0}]) == {"mean": 100}


def test_pope_counts_only_yes_and_no():
    pairs = [("yes", "yes")] * 3 + [("Yes ", "no")] + [("no", "yes")] * 2 + [("yes.", "yes"), ("no", "no")]
    rows = [dict(prediction=reply, answers=[answer], kind="random", score=metrics.exact(reply, [answer]))
            for reply, answer in pairs]
    assert metrics.pope_official(rows) == pytest.approx({"F1": 100 * 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5),
                                                           "accuracy": 50, "precision": 75, "recall": 60})


def test_hr_is_a_mean_over_rotations():
    rows = [dict(kind=kind, cycle=cycle, score=score) for kind, cycle, score in (
        ("single", "0", 1), ("single", "0", 1), ("single", "1", 0), ("cross", "0", 0), ("cross", "1", 1))]
    assert metrics.hr_official(rows) == pytest.approx({"FSP": 50, "FCP": 50, "average": 100 * (2 / 3 + 1 / 2) / 2})


def test_overlap_of_boxes_at_the_edge_and_outside():
    """Half of a box that sticks out is seen, one that lies elsewhere is not."""
    size = (100, 100)
    assert metrics.overlap([(60, 60, 100, 100)], [(-1, 0, 50, 50)], size) == (False, 0.0)
    assert metrics.overlap([(0, 0, 50, 50)], [(-1, -1, 50, 50)], size) == (True, 1.0)
    assert metrics.overlap([(0, 0, 100, 100)], [(500, 500, 600, 600)], size) == (False, 0.0)


def test_no_rows_is_no_crash():
    figures = [metrics.METRICS[metric].official([]) for metric in ("vqa", "pope", "hr", "relaxed", "ocrbench")]
    assert [next(iter(of_one.values())) for of_one in figures] == [0, 0, 0, 0, 0]


# ---- tables ------------------------------------------------------------------------------------------------------

LLAVA_7B = {"model_type": "llava", "num_hidden_layers": 32, "hidden_size": 4096}


def answered(metric, kinds, plain, two=None):
    """Rows as infer.py keeps them: the answers of each question, plain and two-stage, to "yes" or A."""
    def one(reply):
        right = float(reply.lower() == want.lower())
        return {"answer": reply, "score": right, "seconds": 1.0, "boxes": [[0, 0, 1, 1]], "visual_tokens": 600}
    want = "yes" if metric == "pope" else "A"
    rows = [{"kind": kind, "cycle": str(n % 2), "answers": [want], "plain": one(plain[n])}
            for n, kind in enumerate(kinds)]
    for row, reply in zip(rows, two or ()):
        row["two_stage"] = one(reply)
    return rows


def said_by(rows, config=None, **question):
    """-> (lines that side_by_side says, its summary)."""
    lines = []
    summary = metrics.side_by_side(rows, [question] * len(rows), lines.append, config)
    return [" ".join(line.split()) for line in lines], summary


def test_official_scores_of_pope():
    rows = answered("pope", ["random"] * 4, ["yes", "no", "no", "maybe"], ["yes", "Yes", "no", "yes"])
    lines, summary = said_by(rows, LLAVA_7B, metric="pope", benchmark="pope")
    assert lines[0].startswith("kind n plain two-st.") and lines[1].startswith("random 4 25.0 75.0 +50.0 0 2")
    assert lines[-5:] == ["official, 4 questions plain two-st. the paper's, LLaVA-1.5-7B",
                          "F1 50.0 85.7 85.9 -> 87.1",          # 2 * 1 / (2 * 1 + 2), and 2 * 3 / (2 * 3 + 1)
                          "accuracy 25.0 75.0 - -> 87.8", "precision 100.0 100.0", "recall 33.3 75.0"]
    assert summary == {"plain": 50.0, "two_stage": 85.71, "questions": 4, "metric": "pope", "official": {
        "plain": {"F1": 50.0, "accuracy": 25.0, "precision": 100.0, "recall": 33.33},
        "two_stage": {"F1": 85.71, "accuracy": 75.0, "precision": 100.0, "recall": 75.0}}}


def test_official_scores_of_hr_bench():
    rows = answered("hr", ["single", "single", "cross", "cross"], ["A", "A", "B", "A"])
    lines, summary = said_by(rows, LLAVA_7B, metric="hr", benchmark="hrbench8k")
    assert lines[-4:] == ["official, 4 questions plain the paper's, LLaVA-1.5-7B", "average 75.0 33.8 -> 39.1",
                          "FSP 100.0 - -> 46.5", "FCP 50.0 - -> 31.8"]
    assert summary["plain"] == 75 and summary["official"]["plain"]["FCP"] == 50


def test_official_scores_of_ocrbench_are_points():
    kinds = ["Handwriting Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    lines, summary = said_by(answered("ocrbench", kinds, ["A", "A", "A"]), metric="ocrbench", benchmark="ocrbench")
    assert lines[-6:-3] == ["points 3.0", "Text Recognition 2.0", "Scene Text-centric VQA 0.0"]
    assert summary == {"plain": 100.0, "questions": 3, "metric": "ocrbench"}


def test_the_papers_figures_stand_beside_their_own_model_alone():
    rows = answered("letter", ["direct_attributes", "relative_position"], ["A", "B"])
    lines, _ = said_by(rows, LLAVA_7B | {"hidden_size": 128}, metric="letter", benchmark="vstar")
    assert lines[-4:] == ["official, 2 questions plain", "mean 50.0", "direct_attributes 100.0",
                          "relative_position 0.0"]
    lines, _ = said_by(rows, {"model_type": "qwen2_5_vl", "num_hidden_layers": 28, "hidden_size": 3584},
                       metric="letter", benchmark="vstar")
    assert lines[-4:-2] == ["official, 2 questions plain the paper's, Qwen2.5-VL-7B", "mean 50.0 78.0 -> 89.5"]
    assert not any("official" in line for line in said_by(rows, LLAVA_7B)[0])   # of no benchmark
    mixed, lines = [{"metric": "pope", "benchmark": "pope"}, {"metric": "exact"}], []
    summary = metrics.side_by_side(rows, mixed, lines.append, LLAVA_7B)
    assert not any("official" in line for line in lines)
    assert summary == {"plain": 50.0, "questions": 2, "metric": None}
    figures = {name for model in metrics.PAPER.values() for name in model}
    assert set(metrics.PAPER) <= set(metrics.PAPER_MODELS.values()) and figures == set(benchmarks.BENCHMARKS)


def test_nothing_of_the_user_reaches_the_terminal_raw(tmp_path, capsys):
    bad = "red\x1b[2J\x07\u202e"
    rows = answered("letter", [bad, "blue"], ["A", "B"])
    lines, _ = said_by(rows, metric="letter", benchmark="vstar")
    asked = [(None, {"kind": bad, "answers": ["a"]})]
    row = {"imgname": bad + ".png", "query": "How many?", "label": "14"}
    file = save(tmp_path / f"test_{bad}.json", [row, row | {"imgname": "a.png"}])
    save(tmp_path / "png/a.png", png())
    convert(tmp_path, "chartqa", file)
    said = capsys.readouterr()
    text = "".join([*lines, metrics.compare(asked, {"plain": lambda image, q: "a"}), said.out, said.err])
    assert text.replace("\n", "").isprintable() and "red\\x1b[2J\\x07" in said.err + text
    assert error_of(capsys, lambda: benchmarks.main(["chartqa", str(tmp_path / bad)])).strip().isprintable()


# ---- benchmarks --------------------------------------------------------------------------------------------------

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


def convert(tmp_path, name, *files, images=None):
    """Run the command; -> (root named by the first line, questions)."""
    out = tmp_path / "out" / f"{name}.jsonl"
    benchmarks.main([name, *map(str, files), "--out", str(out)] + (["--images", str(images)] if images else []))
    first, *questions = map(json.loads, out.read_text().splitlines())
    assert all((Path(first["images"]) / question["image"]).is_file() for question in questions)
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]   # no leftovers
    return Path(first["images"]), questions


def error_of(capsys, command):
    """Run a command that must refuse; -> its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        command()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


TEXTVQA = {"image_id": "003a", "question_id": 34602, "question": "What does the NASA sign say?", "set_name": "val",
           "answers": ["nokia"] * 10, "question_tokens": [], "image_width": 4, "image_height": 3, "image_classes": []}


@pytest.mark.parametrize("images, relative", [("train_images", "003a.jpg"), (".", "train_images/003a.jpg")])
def test_textvqa(tmp_path, capsys, images, relative):
    file = save(tmp_path / "val.json", {"dataset_type": "val", "data": [TEXTVQA, TEXTVQA | {"image_id": "gone"}]})
    save(tmp_path / "train_images/003a.jpg", png())
    root, questions = convert(tmp_path, "textvqa", file, images=tmp_path / images)
    assert root == tmp_path / images and root.is_absolute()
    assert questions == [dict(id="34602", image=relative, question="What does the nasa sign say?" + SHORT,
                              answers=["nokia"] * 10, metric="vqa", max_new_tokens=1024, tau=0.15,
                              benchmark="textvqa")]
    said = capsys.readouterr()
    assert "infer.py --eval" in said.out and "train_images/gone.jpg" in said.err and "5000" in said.err


def test_docvqa_and_infovqa(tmp_path):
    shared = {"questionId": 337, "question": "What is the Date?", "answers": ["1/8/93", "1993"], "data_split": "val"}
    doc = save(tmp_path / "val_v1.0_withQT.json", b"\xef\xbb\xbf" + json.dumps(   # a byte-order mark in front
        {"dataset_name": "SP-DocVQA", "data": [shared | {"image": "documents/rnbx0223_193.png", "docId": 1}]}).encode())
    save(tmp_path / "documents/rnbx0223_193.png", png())
    info = save(tmp_path / "info.json", {"data": [shared | {"image_local_name": "20471.jpeg", "image_url": "x"}]})
    save(tmp_path / "infographicsvqa_images/20471.jpeg", png())
    want = dict(id="337", question="What is the Date?" + SHORT, answers=["1/8/93", "1993"], metric="anls",
                max_new_tokens=32)
    assert convert(tmp_path, "docvqa", doc)[1] == [
        want | dict(image="documents/rnbx0223_193.png", tau=0.10, benchmark="docvqa")]
    assert convert(tmp_path, "infovqa", info)[1] == [
        want | dict(image="infographicsvqa_images/20471.jpeg", tau=0.15, benchmark="infovqa")]


def test_chartqa_takes_both_files(tmp_path):
    row = {"imgname": "41699051005347.png", "query": "How many bars?", "label": "14"}
    files = [save(tmp_path / f"test_{kind}.json", [row]) for kind in ("human", "augmented")]
    save(tmp_path / "png/41699051005347.png", png())
    _, questions = convert(tmp_path, "chartqa", *files)
    assert [q["id"] for q in questions] == ["human-0", "augmented-0"]
    assert [q["kind"] for q in questions] == ["human", "augmented"]
    assert questions[0] | {"id": 0, "kind": 0} == dict(
        id=0, kind=0, image="png/41699051005347.png", answers=["14"], metric="relaxed", max_new_tokens=16, tau=0.15,
        benchmark="chartqa",
        question="How many bars?\nAnswer the question with a single word.")


def test_ocrbench_questions(tmp_path):
    rows = [{"dataset_name": "IIIT5K", "id": 2843, "image_path": "IIIT5K/test/918_1.png", "answers": "CENTRE",
             "question": " what is written in the image? ", "type": "Regular Text Recognition"},
            {"dataset_name": "HME100k", "id": 1, "image_path": "HME100k/1.jpg", "answers": ["x^2", 4],
             "question": "Formula?", "type": "Handwritten Mathematical Expression Recognition"}]
    for row in rows:
        save(tmp_path / "OCRBench_Images" / row["image_path"], png())
    file = save(tmp_path / "OCRBench.json", rows)
    _, questions = convert(tmp_path, "ocrbench", file, images=tmp_path / "OCRBench_Images")
    assert questions[0] == dict(
        id="0", kind="Regular Text Recognition", dataset="IIIT5K", image="IIIT5K/test/918_1.png", answers=["CENTRE"],
        question="what is written in the image?", metric="ocrbench", max_new_tokens=128, tau=0.05,
        benchmark="ocrbench")
    assert questions[1]["answers"] == ["x^2", "4"] and questions[1]["dataset"] == "HME100k"


def test_vstar_repeats_the_instruction_and_finds_boxes(tmp_path):
    rows = [{"question_id": 0, "image": "direct_attributes/sa_4690.jpg", "category": "direct_attributes", "label": "A",
             "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather" + LETTER},
            {"question_id": 1, "image": "relative_position/sa_1.jpg", "category": "relative_position", "label": "B",
             "text": "Is the dog left or right of the car?\n(A) right\n(B) left" + LETTER}]
    file = save(tmp_path / "test_questions.jsonl", "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n")
    for row in rows:
        save(tmp_path / row["image"], png())
    save(tmp_path / "direct_attributes/sa_4690.json", {"target_object": ["glove"], "bbox": [[1682, 1175, 28, 31]]})
    _, questions = convert(tmp_path, "vstar", file)
    assert questions[0] == dict(
        id="0", kind="direct_attributes", image="direct_attributes/sa_4690.jpg", answers=["A"],
        boxes=[[1682, 1175, 1710, 1206]],
        question="What is the material of the glove?\nA. rubber\nB. cotton\nC. kevlar\nD. leather" + 2 * LETTER,
        metric="letter", max_new_tokens=16, tau=0.10, benchmark="vstar")
    assert questions[1]["question"] == "Is the dog left or right of the car?\nA. right\nB. left" + 2 * LETTER
    assert "boxes" not in questions[1]


def test_pope_pools_three_files(tmp_path):
    row = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "label": "yes",
           "text": "Is there a snowboard\u2028?"}   # a line separator, but not to JSON
    files = [save(tmp_path / f"coco_pope_{kind}.json", json.dumps(row, ensure_ascii=False) + "\n")
             for kind in ("random", "popular", "adversarial")]
    save(tmp_path / "val2014" / row["image"], png())
    _, questions = convert(tmp_path, "pope", *files, images=tmp_path / "val2014")
    assert [question["id"] for question in questions] == ["random-1", "popular-1", "adversarial-1"]
    assert questions[2] == dict(
        id="adversarial-1", kind="adversarial", image=row["image"], answers=["yes"], metric="pope", max_new_tokens=128,
        question="Is there a snowboard\u2028?" + SHORT, tau=0.15, benchmark="pope")


def hr_file(path, **change):
    row = dict(index=0, question="What colour? ", answer="B", category="single", A="red", B='"dark"\tblue', C="green",
               D="", cycle_category="0", image=base64.b64encode(png()).decode()) | change
    rows = [row, row | dict(index=1, category="cross", answer="A", cycle_category="1"),
            row | dict(index=2, image=base64.b64encode(png(9)).decode())]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, row, delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def test_hrbench_unpacks_each_picture_once(tmp_path):
    root, questions = convert(tmp_path, "hrbench4k", hr_file(tmp_path / "hr_bench_4k.tsv"))
    assert root == tmp_path / "out/hrbench4k_images" and len(list(root.iterdir())) == 2
    assert questions[0]["image"] == questions[1]["image"] != questions[2]["image"]
    assert (root / questions[0]["image"]).read_bytes() == png()
    assert [(question["kind"], question["cycle"], question["answers"]) for question in questions] == [
        ("single", "0", ["B"]), ("cross", "1", ["A"]), ("single", "0", ["B"])]
    assert questions[0] | {"image": 0, "cycle": 0} == dict(
        id="0", kind="single", cycle=0, image=0, answers=["B"], options={"A": "red", "B": '"dark"\tblue', "C": "green"},
        question='What colour?\nA. red\nB. "dark"\tblue\nC. green\nAnswer the option letter directly.',
        metric="hr", max_new_tokens=1024, tau=0.10, benchmark="hrbench4k")


# ---- parquet -----------------------------------------------------------------------------------------------------

def hub_file(path, rows, per_group=2):
    """A parquet file as the hub has them: pictures as {"bytes", "path"}, small row groups."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: {"bytes": v, "path": None} if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=per_group)
    return path


def test_textvqa_from_the_hub(tmp_path):
    rows = [TEXTVQA | {"question_id": 34602 + i, "image_id": f"{i}", "answers": [str(i)] * 10} for i in range(3)]
    file = save(tmp_path / "val.json", {"data": rows})
    for i in range(3):
        save(tmp_path / f"train_images/{i}.jpg", png(i))
    shards = [hub_file(tmp_path / f"hub/data/{split}-0000{n}-of-00002.parquet", [
        row | {"image": png(i), "flickr_300k_url": "x", "ocr_tokens": []} for i, row in enumerate(rows)][part])
        for split, n, part in (("validation", 0, slice(2)), ("validation", 1, slice(2, 3)), ("test", 0, slice(3)))]
    assert same_questions(tmp_path, "textvqa", [file], shards[:2]) == ["34602", "34603", "34604"]
    assert same_questions(tmp_path, "textvqa", [file], [tmp_path / "hub"]) == ["34602", "34603", "34604"]


def same_questions(tmp_path, name, official, hub):
    """Both routes, the same questions over the same pictures -> their ids."""
    here, want = convert(tmp_path, name, *official)
    there, got = convert(tmp_path / "from the hub", name, *hub)
    assert there.name == f"{name}_images"
    assert [q | {"image": (there / q["image"]).read_bytes()} for q in got] == [
        q | {"image": (here / q["image"]).read_bytes()} for q in want]
    return [q["id"] for q in got]


def test_docvqa_and_infovqa_from_the_hub(tmp_path):
    shared = {"questionId": "337", "question": "What is the Date?", "answers": ["1/8/93", "1993"], "data_split": "val"}
    doc = save(tmp_path / "doc.json", {"data": [shared | {"image": "documents/a.png"}] * 2})
    info = save(tmp_path / "info.json", {"data": [shared | {"image_local_name": "b.png"}]})
    save(tmp_path / "documents/a.png", png(1))
    save(tmp_path / "infographicsvqa_images/b.png", png(2))
    hub = tmp_path / "DocVQA"   # the data set's own name, which must not count
    hub_file(hub / "DocVQA/validation-00000-of-00006.parquet", [
        shared | {"image": png(1), "docId": 1, "ucsf_document_id": "x", "question_types": ["layout"]}] * 2)
    hub_file(hub / "DocVQA/test-00000-of-00006.parquet", [shared | {"image": png(3), "answers": None}])
    hub_file(hub / "InfographicVQA/validation-00000-of-00006.parquet", [
        shared | {"image": png(2), "image_url": "x", "operation/reasoning": ["count"], "ocr": "[]"}])
    assert same_questions(tmp_path, "docvqa", [doc], [hub]) == ["337", "337"]
    assert len(list((tmp_path / "from the hub/out/docvqa_images").iterdir())) == 1   # one picture, two questions
    assert same_questions(tmp_path, "infovqa", [info], [hub]) == ["337"]


def test_chartqa_from_the_hub(tmp_path):
    row = {"imgname": "1.png", "query": "How many bars?", "label": "14"}
    files = [save(tmp_path / f"test_{kind}.json", [row, row]) for kind in ("human", "augmented")]
    save(tmp_path / "png/1.png", png())
    hub = hub_file(tmp_path / "test-00000-of-00001.parquet", [
        {"type": kind, "question": row["query"], "answer": row["label"], "image": png()}
        for kind in ("human_test", "human_test", "augmented_test", "augmented_test")])
    ids = ["human-0", "human-1", "augmented-0", "augmented-1"]
    assert same_questions(tmp_path, "chartqa", files, [hub]) == ids


def test_ocrbench_from_the_hub(tmp_path):
    row = {"dataset_name": "IIIT5K", "image_path": "1.png", "answers": ["CENTRE"], "type": "Regular Text Recognition",
           "question": "what is written in the image? "}
    file = save(tmp_path / "OCRBench.json", [row, row | {"dataset_name": "HME100k", "type": "Doc-oriented VQA"}])
    save(tmp_path / "OCRBench_Images/1.png", png())
    hub = [hub_file(tmp_path / f"data/test-0000{n}-of-00002.parquet", [
        {"dataset": name, "question": row["question"], "question_type": kind, "answer": ["CENTRE"], "image": png()}])
        for n, (name, kind) in enumerate((("IIIT5K", row["type"]), ("HME100k", "Doc-oriented VQA")))]
    assert same_questions(tmp_path, "ocrbench", [file], hub) == ["0", "1"]


def test_vstar_from_the_hub(tmp_path):
    row = {"question_id": "0", "image": "direct_attributes/sa_4690.png", "category": "direct_attributes", "label": "A",
           "text": "What is the material of the glove?\n(A) rubber\n(B) cotton" + LETTER}
    file = save(tmp_path / "test_questions.jsonl", json.dumps(row))
    save(tmp_path / row["image"], png())
    hub = hub_file(tmp_path / "data/test-00000-of-00001.parquet", [row | {"image": png()}])
    assert same_questions(tmp_path, "vstar", [file], [hub]) == ["0"]


def test_pope_from_the_hub(tmp_path):
    rows = [{"question_id": n, "image": "1.png", "text": "Is there a dog?", "label": "no"} for n in (1, 2)]
    kinds = ("adversarial", "popular", "random")
    files = [save(tmp_path / f"coco_pope_{kind}.json", "\n".join(map(json.dumps, rows))) for kind in kinds]
    save(tmp_path / "val2014/1.png", png())
    rows = [{"id": "0", "question_id": str(row["question_id"]), "question": row["text"], "answer": "no",
             "image_source": "1", "image": png(), "category": kind} for kind in kinds for row in rows]
    hub_file(tmp_path / "hub/data/test-00000-of-00003.parquet", rows, per_group=4)
    hub_file(tmp_path / "hub/Full/popular-00000-of-00001.parquet", rows[:2])   # the same again, by file
    ids = [f"{kind}-{n}" for kind in kinds for n in (1, 2)]
    assert same_questions(tmp_path, "pope", files, [tmp_path / "hub"]) == ids


def test_hrbench_from_the_hub(tmp_path):
    file = hr_file(tmp_path / "hr_bench_4k.tsv")
    with open(file, newline="") as lines:
        rows = [row | {"index": int(row["index"]), "D": None} for row in csv.DictReader(lines, delimiter="\t")]
    hub_file(tmp_path / "hub/hr_bench_4k.parquet", rows)
    hub_file(tmp_path / "hub/hr_bench_8k.parquet", rows[:1])
    assert same_questions(tmp_path, "hrbench4k", [file], [tmp_path / "hub"]) == ["0", "1", "2"]


def test_bad_parquet_files_leave_nothing(tmp_path, capsys):
    row = {"type": "human_test", "question": "How many?", "answer": "14", "image": png()}
    good = hub_file(tmp_path / "test.parquet", [row] * 6)
    pieces = pytest.importorskip("pyarrow.parquet").ParquetFile(good).metadata
    broken = bytearray(good.read_bytes())
    at = pieces.row_group(2).column(0).data_page_offset
    broken[at:at + 8] = b"\xff" * 8
    out = tmp_path / "out/q.jsonl"
    out.parent.mkdir()

    def refusal(*arguments):
        message = error_of(capsys, lambda: benchmarks.main(["chartqa", *map(str, arguments), "--out", str(out)]))
        assert not list(out.parent.iterdir())
        return message
    assert "near question 4: not a parquet file, or cut short" in refusal(save(tmp_path / "a.parquet", bytes(broken)))
    assert "near question 1: not a parquet file" in refusal(save(tmp_path / "b.parquet", good.read_bytes()[:-9]))
    assert "no field 'answer'" in refusal(hub_file(tmp_path / "c.parquet", [{"text": "How many?", "image": png()}]))
    assert "not a picture" in refusal(hub_file(tmp_path / "d.parquet", [row, row | {"image": b"GIF8"}]))
    assert "not a picture" in refusal(hub_file(tmp_path / "e.parquet", [row | {"image": {"path": "1.png"}}]))
    assert "no answer" in refusal(hub_file(tmp_path / "f.parquet", [row | {"answer": None}]))
    assert "leave --images out" in refusal(good, "--images", tmp_path)
    assert "not both" in refusal(good, save(tmp_path / "test_human.json", []))
    assert "holds no *test*.parquet" in refusal(out.parent)


def test_parquet_without_pyarrow_names_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = save(tmp_path / "test.parquet", b"PAR1")
    message = error_of(capsys, lambda: benchmarks.main(["chartqa", str(file), "--out", str(tmp_path / "q.jsonl")]))
    assert message.endswith("reading parquet needs pyarrow: pip install pyarrow\n")


@pytest.mark.parametrize("content, problem", [
    ("[{\"image_id\": ", "near question 1"), (b"PAR1\xff\xfe\x00", "utf-8"), ([1, 2], "near question 1"),
    ({"a": 1}, "no list"), ([], "no question"), ([{"image_id": 1}], "no field 'question_id'"),
    ([TEXTVQA | {"question": 5}], "near question 1"), ([TEXTVQA | {"answers": []}], "no answer"),
    ([TEXTVQA], "none of the 1 pictures")])
def test_bad_files_leave_nothing(tmp_path, capsys, content, problem):
    file, out = save(tmp_path / "val.json", content), tmp_path / "out/q.jsonl"
    save(out, "what was here before")
    message = error_of(capsys, lambda: benchmarks.main(["textvqa", str(file), "--out", str(out)]))
    assert problem in message and ("TextVQA_0.5.1_val.json" in message or "--images" in message)
    assert out.read_text() == "what was here before" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("image, problem", [("AAAA", "not a picture"), ("A", "not a picture")])
def test_bad_pictures_in_hrbench(tmp_path, capsys, image, problem):
    file, out = hr_file(tmp_path / "hr.tsv", image=image), tmp_path / "out/hr.jsonl"
    assert problem in error_of(capsys, lambda: benchmarks.main(["hrbench8k", str(file), "--out", str(out)]))
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("arguments, problem", [
    (["mmlu", "a.json"], "mmlu"), (["pope", "gone.json"], "gone.json: no such file"), (["pope"], "FILE"),
    (["pope", "{file}", "--images", "nowhere"], "nowhere: no such folder"),
    (["pope", "{file}", "--out", "{file}"], "overwritten"), (["hrbench4k", "{file}", "--images", "."], "--images"),
    (["pope", "{file}", "--out", "{file}/q.jsonl"], "check the path")])
def test_bad_commands(tmp_path, capsys, arguments, problem):
    file = save(tmp_path / "there.json", "{}")
    arguments = [argument.format(file=file) for argument in arguments]
    assert problem in error_of(capsys, lambda: benchmarks.main(arguments)) and file.read_text() == "{}"


# ---- llava_mix ---------------------------------------------------------------------------------------------------

def talk(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


MIX = [
    {"id": 1, "image": "coco/train2017/gqa.jpg", "conversations": talk("<image>\nWhat?", "It.")},
    {"id": 2327515, "image": "gqa/images/1.jpg", "conversations": talk(
        f"<image>\nAre there scarves?{SHORT}", "Yes", "What is left of the man?", "car")},
    {"id": "140031996X", "image": "ocr_vqa/images/2.jpg", "model": "x",
     "conversations": talk(f"Who?{SHORT}\n<image>", "Ann")},
    {"id": "t", "conversations": talk("Tell me about gqa.", "No.")},                                  # text only
    {"id": "v", "image": "textvqa/train_images/3.jpg", "conversations": talk("<image>\nWhat?", "It.")},
    {"id": 5, "image": "gqa/images/1.jpg", "conversations": talk("<image>\nSame image?", "Same")},   # stays, too
    {"id": 6, "image": "gqa/images/gone.jpg", "conversations": talk("<image>\nWhat?", "It.")},
    {"id": 7, "image": "gqa/images/empty.jpg", "conversations": talk("<image>\nWhat?", "It.")},
    {"id": 8, "image": "ocr_vqa/images/1437717772.jpg", "conversations": talk("<image>\nWhat?", "It.")},    # broken
    {"id": 9, "image": "ocr_vqa/images/51WYdiyqywL.jpg", "conversations": talk("<image>\nRepaired?", "")},
    {"id": 10, "image": "gqa/images/1.jpg", "conversations": talk("<image>\nUnanswered?")},      # from here malformed
    {"id": 11, "image": "gqa/images/1.jpg", "conversations": talk("<image>\n", "Nothing asked")},
    {"id": 12, "image": "gqa/images/1.jpg"},
    {"id": 13, "image": ["gqa/images/1.jpg"], "conversations": talk("<image>\nWhat?", "It.")},
    {"id": 14, "image": "gqa/images/1.jpg", "conversations": talk("a", "b")[::-1]},
    "not a record",
]


@pytest.fixture
def mix(tmp_path):
    """-> run(*arguments, records=MIX): questions. The folder's own name holds "gqa", which must not matter."""
    root = tmp_path / "my_gqa_data"
    for name in ("coco/train2017/gqa.jpg", "textvqa/train_images/3.jpg", "gqa/images/1.jpg", "ocr_vqa/images/2.jpg",
                 "ocr_vqa/images/51WYdiyqywL.jpg"):
        save(root / name, png())
    save(root / "gqa/images/empty.jpg", b"")
    save(root / "ocr_vqa/images/1437717772.jpg", png()[:40])

    def run(*arguments, records=MIX):
        out = tmp_path / "mix.jsonl"
        text = "\ufeff" + json.dumps(records, indent=1).replace("\n", "\r\n")   # as a Windows editor would save it
        llava_mix.main([str(save(tmp_path / "mix.json", text)), "--images", str(root), "--out", str(out), *arguments])
        assert not list(tmp_path.glob("*.part*"))
        first, *questions = map(json.loads, out.read_text().splitlines())
        assert first == {"images": str(root)}
        return questions
    return run


def test_llava_mix_takes_first_questions(mix, capsys):
    assert mix() == [
        dict(id="1", kind="gqa", image="gqa/images/1.jpg", question="Are there scarves?" + SHORT, answers=["Yes"]),
        dict(id="2", kind="ocr_vqa", image="ocr_vqa/images/2.jpg", question="Who?" + SHORT, answers=["Ann"]),
        dict(id="5", kind="gqa", image="gqa/images/1.jpg", question="Same image?", answers=["Same"]),
        dict(id="9", kind="ocr_vqa", image="ocr_vqa/images/51WYdiyqywL.jpg", question="Repaired?", answers=[""])]
    said = capsys.readouterr()
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert lines[0].startswith("gqa 2 kept") and lines[0].endswith("2 without a usable picture")
    assert lines[1].startswith("ocr_vqa 2 kept") and lines[1].endswith("1 without a usable picture")
    assert lines[2] == "left out 2 other sources, 1 text only, 6 malformed"
    assert "gone.jpg" in said.err and "1437717772.jpg: known" in said.err and "record 10" in said.err


def test_what_can_not_be_written_leaves_nothing(mix, tmp_path, capsys):
    taken = save(tmp_path / "taken/by a folder/x", "").parent
    pope = save(tmp_path / "coco_pope_random.json", {"question_id": 1, "image": "1.jpg", "text": "?", "label": "no"})
    save(tmp_path / "val2014/1.jpg", png())
    for command in (lambda: mix("--out", str(taken)),
                    lambda: benchmarks.main(["pope", str(pope), "--out", str(taken)])):
        assert "by a folder" in error_of(capsys, command)
        assert list(taken.parent.iterdir()) == [taken]


def test_a_pictures_name_forges_no_line(mix, capsys):
    record = dict(image="gqa/images/x\nllava_mix.py: all is well\n.jpg",
                  conversations=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}])
    mix(records=[record, *MIX])
    said = capsys.readouterr().err.splitlines()
    assert any(r"x\nllava_mix.py: all is well\n.jpg" in line for line in said)
    assert not [line for line in said if line.startswith("llava_mix.py:")]


def test_llava_mix_keeps_conversations(mix):
    first = mix("--all-turns")[0]
    assert first["question"] == ["Are there scarves?" + SHORT, "What is left of the man?"]
    assert first["answers"] == ["Yes", "car"]


@pytest.mark.parametrize("records, problem", [
    ({"data": []}, "no list"), ([], "no GQA or OCR-VQA"), (MIX[:1], "no GQA or OCR-VQA"), (MIX[6:7], "gone.jpg")])
def test_llava_mix_refuses_useless_files(mix, capsys, tmp_path, records, problem):
    assert problem in error_of(capsys, lambda: mix(records=records))
    assert not (tmp_path / "mix.jsonl").exists()


@pytest.mark.parametrize("arguments, problem", [
    (["gone.json", "--images", "."], "gone.json"), (["{file}", "--images", "."], "not JSON"), (["{file}"], "--images"),
    (["{file}", "--images", "nowhere"], "nowhere"), (["{file}", "--images", ".", "--out", "{file}"], "overwritten")])
def test_llava_mix_bad_commands(capsys, tmp_path, arguments, problem):
    file = save(tmp_path / "cut.json", '[{"id": 1, ')
    assert problem in error_of(capsys, lambda: llava_mix.main([argument.format(file=file) for argument in arguments]))
    assert file.read_text() == '[{"id": 1, '
