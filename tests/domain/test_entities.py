"""Names in Spanish and English texts, told by how they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.entities import candidates, entities_of, folded, mentions, names_of_title
from topics.knowledge import Passage


def passage(text: str, number: int = 0) -> Passage:
    return Passage(f"p{number}", "d", number, text, 0, len(text))


def named(text: str, title: str = "") -> set[str]:
    return {mention.name for mention in mentions([passage(text)], title) if not mention.about}


@pytest.mark.parametrize(
    ("text", "there", "missing"),
    [
        (
            "El presidente de la República Argentina, Raúl Alfonsín, viajó a Nueva York.",
            {"República Argentina", "Raúl Alfonsín", "Nueva York"},
            {"El", "presidente"},
        ),
        (
            "La casa era grande. Casa blanca, dijo. Ludwig van Beethoven nació en Bonn.",
            {"Ludwig van Beethoven", "Bonn"},
            {"La", "Casa", "La casa"},
        ),
        (
            "She was a daughter of King Lothair II of Lotharingia and the Duke of Lucca.",
            {"Lothair II", "Lotharingia", "King Lothair II of Lotharingia", "Lothair II of Lotharingia", "Duke of Lucca"},
            {"She", "King", "Duke", "II"},
        ),
        (
            "J. R. R. Tolkien met Dr. Smith in the U.S.A. in 1950.",
            {"J. R. R. Tolkien", "Dr. Smith", "Smith", "U.S.A"},
            {"J", "R. R", "Dr"},
        ),
        (
            'Según García Márquez, «Cien años de soledad» y "What is God?" son libros.',
            {"García Márquez", "Cien años de soledad", "What is God?"},
            {"Según"},
        ),
        (
            "Shakespeare's Hamlet and Apollo 11 were shown at Albert III, Duke of Bavaria.",
            {"Shakespeare", "Hamlet", "Apollo 11", "Apollo", "Albert III, Duke of Bavaria"},
            set(),
        ),
        ("However, this is nothing. En enero, nada. The end.", set(), {"However", "En", "The", "enero"}),
    ],
)  # fmt: skip
def test_names_are_found_and_the_beginnings_of_sentences_are_not(text: str, there: set[str], missing: set[str]) -> None:
    found = named(text)
    assert there <= found
    assert not missing & found


def test_the_beginning_of_a_sentence_is_a_name_where_the_document_writes_it_so_elsewhere() -> None:
    assert "Frida" in named("Frida pintaba. La casa de Frida es azul.")
    assert "Frida" not in named("Frida pintaba. La casa es azul.")
    assert "Capibaras Azules" in named("Capibaras Azules es un grupo.")
    assert "Capibaras Azules" not in named("Capibaras Azules es un grupo. Muchas capibaras nadan.")


def test_what_a_document_is_called_is_what_all_its_passages_are_about() -> None:
    made = mentions([passage("It was sung by Sinatra.", 0), passage("Nothing.", 1)], "Come Dance with Me (song)")
    about = {(mention.passage, mention.entity) for mention in made if mention.about}
    assert about == {(f"p{number}", key) for number in (0, 1) for key in ("come dance with me song", "come dance with me")}
    assert [mention.entity for mention in made if not mention.about] == ["sinatra"]
    assert names_of_title("Albert III, Duke of Bavaria") == ["Albert III, Duke of Bavaria", "Albert III"]
    assert names_of_title("1984") == []


def test_known_names_count_wherever_they_stand() -> None:
    made = mentions([passage("he sang come dance with me twice")], known=["Come Dance with Me", "Dance"])
    assert [mention.entity for mention in made] == ["come dance with me"]


def test_keys_are_the_same_however_a_name_is_written() -> None:
    assert folded("The BEATLES") == folded("Beatles") == "beatles"
    assert folded("García-Márquez") == folded("garcia marquez") == "garcia marquez"
    assert folded("Back in the U.S.A.") == "back in the u s a"


def test_a_question_has_names_and_candidates_without_capitals() -> None:
    assert entities_of("Who is the father-in-law of Sisowath Kossamak?") == ["Sisowath Kossamak"]
    assert entities_of("¿Dónde nació Frida Kahlo?") == ["Frida Kahlo"]
    found = candidates("¿dónde nació frida kahlo?")
    assert "frida kahlo" in found
    assert "nacio frida kahlo" in found
    assert found.index("nacio frida kahlo") < found.index("frida kahlo") < found.index("kahlo")
    assert "donde" not in found


@given(st.text(max_size=300), st.text(max_size=40), st.lists(st.text(max_size=20), max_size=3))
def test_no_text_is_too_odd(text: str, title: str, known: list[str]) -> None:
    made = mentions([passage(text), passage(text, 1)], title, known)
    assert len({(mention.passage, mention.entity) for mention in made}) == len(made)
    assert all(mention.entity == folded(mention.name) != "" for mention in made)
    assert all(candidates(text))


@pytest.mark.parametrize("piece", ["A", "A of ", "a ", '"', "A. ", "*A*", "«A", "A, ", "(", "A's "])
def test_time_is_linear_in_hostile_texts(piece: str) -> None:
    """A quadratic step would take minutes here, and the suite's own time limit would end it."""
    assert len(mentions([passage(piece * 10_000)], "T")) <= 97
