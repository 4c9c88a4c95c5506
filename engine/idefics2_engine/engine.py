"""The step loop: schedule, run, finish."""

from idefics2_engine.config import EngineConfig, GenerationConfig
from idefics2_engine.detokenizer import Detokenizer
from idefics2_engine.images import ImageConfig
from idefics2_engine.kv_cache import KVCache
from idefics2_engine.logprobs import TokenTexts
from idefics2_engine.model import Idefics2
from idefics2_engine.pages import PageAllocator
from idefics2_engine.prompt import Tokenizer
from idefics2_engine.runner import Runner
from idefics2_engine.sampler import Sampler
from idefics2_engine.scheduler import Scheduler
from idefics2_engine.sequence import Request, Sequence


class Engine:
    """Answers many requests at once on one device."""

    def __init__(
        self,
        model: Idefics2,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        generation: GenerationConfig,
        config: EngineConfig,
        *,
        min_p_first: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation = generation
        self.scheduler = Scheduler(
            PageAllocator(config.num_pages, config.page_size),
            config.max_num_seqs,
            config.max_prefill_tokens,
        )
        kv_cache = KVCache(
            model.config.text, config.num_pages, config.page_size, model.device, model.dtype
        )
        self.runner = Runner(model, kv_cache, image_config)
        self.sampler = Sampler(
            model.ops,
            generation.bad_words_ids,
            model.config.image_token_id,
            TokenTexts(tokenizer),
            min_p_first=min_p_first,
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue the sequences of ``request``; it must fit the engine's lengths."""
        for index in range(request.params.n):
            detokenizer = Detokenizer(self.tokenizer, request.params.skip_special_tokens)
            sequence = Sequence(request, index, self.generation.eos_token_ids, detokenizer)
            request.sequences.append(sequence)
            self.scheduler.add(sequence)

    def step(self) -> list[Sequence]:
        """Add one token to each sequence that runs, and return these sequences."""
        sequences = self.scheduler.schedule()
        logits, prompts = self.runner.run(sequences)
        for request, rows in prompts:
            number = request.params.prompt_logprobs
            followers = request.prompt_token_ids[1:]
            request.prompt_logprobs += self.sampler.prompt_logprobs(rows, followers, number or 0)
        for sequence, choice in zip(sequences, self.sampler.sample(logits, sequences), strict=True):
            sequence.append(*choice)
        self.scheduler.finish(sequences)
        return sequences

    def cancel(self, request: Request) -> None:
        """Drop what is unfinished of ``request``."""
        self.scheduler.cancel(request.sequences)
