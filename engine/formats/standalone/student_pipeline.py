"""The stock pipeline that this class is made from, for a student of potstill that it cannot carry alone: Apache-2.0.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)

Prompts, packing and VAE are the stock pipeline's. New are how its noise begins (`first`, of scheduler/scheduler_config.json: the
student's first input is so many standard normals) and the scheduler (scheduler/student_scheduler.py).
"""

# diffusers is optional, and untyped.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from diffusers import StableDiffusionPipeline as Stock


class StudentPipeline(Stock):
    def prepare_latents(self, *args, **kwargs):
        made, first = super().prepare_latents(*args, **kwargs), self.scheduler.config.first
        return (made[0] * first, *made[1:]) if isinstance(made, tuple) else made * first
