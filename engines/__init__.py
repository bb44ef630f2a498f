"""How it runs: engines that sample and score token ids, the tokenizer, and the finetuning job.

Every heavy library has one home here: vLLM in `vllm_engine`, TRL and PEFT in `sft`, tokenizers in `tokenizer`.
"""
