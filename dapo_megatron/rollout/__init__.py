"""Generation of responses: engines that sample, and the sampler that turns their groups into the batch of one step."""
