"""In place of megatron-core, which SGLang's dumper of tensors imports wherever it is installed; see UPSTREAM.md."""

raise ImportError("a server has no megatron-core ranks")
