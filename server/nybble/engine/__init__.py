"""Block pool, scheduler, runner, sampler and the loop that joins them."""
