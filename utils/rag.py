"""Retrieval-augmented generation: query, information retrieval, integration, response.

`Rag` is the pipeline that lesson 02 builds by hand, for many questions at once and with a trace of every stage. The
same parts serve LlamaIndex: the postprocessors are LlamaIndex's, and `CitedAnswer` is a response synthesizer for its
`RetrieverQueryEngine` that writes the same prompts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode
from tqdm.auto import tqdm

from .llm import ABSTENTION, CourseLLM, Generation, LanguageModel, Passage

__all__ = ["AllowedSources", "CitedAnswer", "NewestEdition", "Rag", "Trace", "WithoutOrders", "guard", "is_supported",
           "passages_of", "ticket_nodes"]


# -- from chunks to passages -------------------------------------------------------------------------------------------
def passages_of(hits: Sequence[NodeWithScore | BaseNode]) -> list[Passage]:
    """The chunks as passages of a prompt, with "title, effective date" as their title, in the order given."""
    return [_passage(h.metadata.get("title", ""), h.metadata.get("effective_date", ""), h.text)
            for h in (getattr(hit, "node", hit) for hit in hits)]


def _passage(title: str, date: str, text: str) -> Passage:
    return Passage(text.strip(), f"{title}, effective {date}" if title and date else title or date)


def ticket_nodes(tickets: Sequence[Any]) -> list[TextNode]:
    """Labelled tickets as chunks, for few-shot RAG: the text with its code is read, the text alone is embedded.

    tickets : objects with id, text and code.
    """
    return [TextNode(id_=t.id, text=f"{t.text}\nTriage code: {t.code}", metadata={"id": t.id, "title": "Labelled ticket",
                                                                                  "effective_date": ""},
                     excluded_embed_metadata_keys=["id", "title", "effective_date"]) for t in tickets]


# -- postprocessors ----------------------------------------------------------------------------------------------------
class NewestEdition(BaseNodePostprocessor):
    """Drop the chunks of documents that a newer edition replaces (`supersedes` in the metadata of the newer one)."""

    replaced: set[str] = set()

    @classmethod
    def of(cls, nodes: Iterable[BaseNode]) -> "NewestEdition":
        """Learn from all chunks of the index which documents are replaced."""
        return cls(replaced={n.metadata["supersedes"] for n in nodes if n.metadata.get("supersedes")})

    @classmethod
    def class_name(cls) -> str:
        return "NewestEdition"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        return [n for n in nodes if n.node.metadata.get("id") not in self.replaced]


class AllowedSources(BaseNodePostprocessor):
    """Keep only chunks whose metadata field `field` has one of the `allowed` values."""

    allowed: set[str]
    field: str = "id"

    @classmethod
    def class_name(cls) -> str:
        return "AllowedSources"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        return [n for n in nodes if n.node.metadata.get(self.field) in self.allowed]


#: words by which a sentence addresses a machine that reads it
_READER = re.compile(r"\b(?:AIs?|A\.I\.|chat-?bots?|bots?|(?:language|parsing|AI) models?|LLMs?|assistants?|robots reading|"
                     r"automated (?:readers?|assistants?|systems?)|summari[sz]ers?|digital helpers|note-takers)\b",
                     re.IGNORECASE)


class WithoutOrders(BaseNodePostprocessor):
    """Cut sentences that address a machine reader out of the chunks. A filter by words: it can be evaded, and it also
    cuts an honest sentence about assistants; lesson 02 counts both."""

    @classmethod
    def class_name(cls) -> str:
        return "WithoutOrders"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        out = []
        for hit in nodes:
            kept = "".join(s for s in re.split(r"(?<=[.!?\"])(?=\s)|(?=\n)", hit.node.get_content()) if not _READER.search(s))
            if kept.strip():
                node = hit.node.model_copy()
                node.set_content(kept.strip())
                out.append(NodeWithScore(node=node, score=hit.score))
        return out


# -- the answer against its sources ------------------------------------------------------------------------------------
def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def is_supported(answer: str, passages: Sequence[Passage]) -> bool:
    """Whether the answer, without citation and a leading yes or no, stands literally in the passage that it cites (in any
    passage where it cites none); an abstention always is."""
    text = answer.strip()
    if text == ABSTENTION:
        return True
    cited = [int(k) for k in re.findall(r"\[(\d+)\]", text)]
    bare = _letters(re.sub(r"^(?:yes|no)\b[,.]?\s*", "", re.sub(r"\s*\[\d+\]", "", text), flags=re.IGNORECASE))
    sources = [passages[k - 1] for k in cited if 0 < k <= len(passages)] if cited else list(passages)
    return bool(bare) and any(f" {bare} " in f" {_letters(p.title + ' ' + p.text)} " for p in sources)


def guard(answer: str, passages: Sequence[Passage]) -> str:
    """The answer, or the abstention where it is not supported by its source."""
    return answer if is_supported(answer, passages) else ABSTENTION


# -- the pipeline ------------------------------------------------------------------------------------------------------
@dataclass
class Trace:
    """What happened to one question, stage by stage.

    seconds : by stage ("retrieval", "integration", "response"); the response's is the question's share of its batch.
    """

    question: str
    hits: list[NodeWithScore] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    prompt: str = ""
    generation: Generation | None = None
    text: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def documents(self) -> tuple[str, ...]:
        """Ids of the documents whose passages stand in the prompt, in its order."""
        return tuple(hit.node.metadata.get("id", "") for hit in self.hits)


class Rag:
    """A retriever, postprocessors and a language model.

    Parameters
    ----------
    retriever : any LlamaIndex retriever; it should return more chunks than `top_k` where postprocessors drop some. None:
        closed-book, the prompt is the question alone.
    top_k : passages in the prompt, at most.
    guarded : replace answers that do not stand in the cited passage by the abstention.
    """

    def __init__(self, llm: LanguageModel, retriever: BaseRetriever | None,
                 postprocessors: Sequence[BaseNodePostprocessor] = (), top_k: int = 3, guarded: bool = False):
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected at least 1 passage in the prompt")
        self.llm, self.retriever, self.top_k, self.guarded = llm, retriever, top_k, guarded
        self.postprocessors = list(postprocessors)

    def retrieve(self, question: str) -> list[NodeWithScore]:
        """The chunks for the prompt, best first."""
        hits = self.retriever.retrieve(question) if self.retriever is not None else []
        for postprocessor in self.postprocessors:
            hits = postprocessor.postprocess_nodes(hits, query_str=question)
        return hits[: self.top_k]

    def ask(self, questions: Sequence[str], hits: Sequence[Sequence[NodeWithScore]] | None = None,
            max_new_tokens: int = 32, label: str = "") -> list[Trace]:
        """Answer all questions; the response stage runs in batches.

        Parameters
        ----------
        hits : chunks for each question instead of retrieved ones (oracle or shuffled contexts, or retrieved before).
        label : of the progress bar of the retrieval; "" shows none.

        Raises
        ------
        ValueError : as many `hits` as questions are expected.
        PromptTooLong : a chunk does not fit; nothing is generated then.
        """
        if hits is not None and len(hits) != len(questions):
            raise ValueError(f"{len(questions)} questions but {len(hits)} lists of hits; expected one list a question")
        traces = []
        for i, question in enumerate(tqdm(questions, desc=label, leave=False, disable=not label)):
            begin = time.perf_counter()
            found = list(hits[i]) if hits is not None else self.retrieve(question)
            middle = time.perf_counter()
            passages = passages_of(found)
            prompt = self.llm.prompt(question, passages)
            traces.append(Trace(question, found, passages, prompt, seconds={
                "retrieval": middle - begin, "integration": time.perf_counter() - middle}))
        for trace, generation in zip(traces, self.llm.generate([t.prompt for t in traces], max_new_tokens)):
            trace.generation, trace.seconds["response"] = generation, generation.seconds
            trace.text = guard(generation.text, trace.passages) if self.guarded and trace.passages else generation.text
        return traces


# -- for LlamaIndex ----------------------------------------------------------------------------------------------------
class CitedAnswer(BaseSynthesizer):
    """A LlamaIndex response synthesizer: one prompt with all passages, written by the model's own chat template.

    LlamaIndex's own synthesizers join the chunks into one text, in which a small model cannot tell the passages apart.
    """

    def __init__(self, llm: CourseLLM, **kwargs: Any):
        super().__init__(llm=llm, **kwargs)

    def _get_prompts(self) -> dict:
        return {}

    def _update_prompts(self, prompts: dict) -> None:
        if prompts:
            raise ValueError(f"CitedAnswer has no prompts to change, but got {sorted(prompts)}; the tokenizer's chat template "
                             "writes its prompt")

    def prompt(self, query_str: str, text_chunks: Sequence[str]) -> str:
        """The prompt for chunks as LlamaIndex hands them over: metadata lines, an empty line, the text."""
        passages = []
        for chunk in text_chunks:
            head, gap, text = chunk.partition("\n\n")
            title, _, date = head.partition("\n") if gap else ("", "", "")
            passages.append(_passage(title, date, text if gap else chunk))
        return self._llm.model.prompt(query_str, passages)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> str:
        return self._llm.complete(self.prompt(query_str, text_chunks), formatted=True).text

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> str:
        return self.get_response(query_str, text_chunks, **kwargs)
