"""The cards that a preflight can stand in for: what a program can ask of them, and their speed."""

from dataclasses import dataclass

GIB = 2**30
KIB = 2**10


@dataclass(frozen=True)
class Card:
    """One card: its data sheet, and the limits of its compute capability (CUDA C++ guide)."""

    name: str  # as the driver gives it
    compute: int  # compute capability, 90 for 9.0
    memory: float  # bytes that cudaMemGetInfo reports as the total
    multiprocessors: int
    threads_per_sm: int
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, the most a kernel can ask for
    l2: int  # bytes
    clock: int  # kHz
    memory_clock: int  # kHz
    bus_width: int  # bits
    bf16_flops: float  # dense, per second
    fp32_flops: float  # without tensor cores, per second
    bandwidth: float  # of memory, bytes per second
    attention: float  # share of the peak that FlashAttention 2 reaches
    link: float  # to the other cards of the machine, bytes per second and direction

    def environment(self, count: int, memory: float) -> dict[str, str]:
        """The stand-in's settings, for runtime.c: `count` such cards with `memory` bytes each."""
        settings = dict(
            NAME=self.name,
            COUNT=count,
            COMPUTE=self.compute,
            MULTIPROCESSORS=self.multiprocessors,
            THREADS_PER_SM=self.threads_per_sm,
            SHARED_PER_SM=self.shared_per_sm,
            SHARED_PER_BLOCK=self.shared_per_block,
            L2=self.l2,
            CLOCK=self.clock,
            MEMORY_CLOCK=self.memory_clock,
            BUS_WIDTH=self.bus_width,
            MEMORY=int(memory),
        )
        return {f"NULLGPU_{name}": str(value) for name, value in settings.items()}


HOPPER = dict(
    compute=90,
    multiprocessors=132,
    threads_per_sm=2048,
    shared_per_sm=228 * KIB,
    shared_per_block=227 * KIB,
    l2=50 * 2**20,
    clock=1_980_000,
    bf16_flops=989e12,
    fp32_flops=67e12,
    attention=0.35,  # it does not use Hopper's own instructions
    link=450e9,  # NVLink 4
)
CARDS = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        memory=79.1 * GIB,
        memory_clock=2_619_000,
        bus_width=5120,
        bandwidth=3.35e12,
        **HOPPER,
    ),
    "h200": Card(
        name="NVIDIA H200",
        memory=139.8 * GIB,
        memory_clock=3_201_000,
        bus_width=6144,
        bandwidth=4.8e12,
        **HOPPER,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        compute=80,
        memory=79.1 * GIB,
        multiprocessors=108,
        threads_per_sm=2048,
        shared_per_sm=164 * KIB,
        shared_per_block=163 * KIB,
        l2=40 * 2**20,
        clock=1_410_000,
        memory_clock=1_593_000,
        bus_width=5120,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        attention=0.6,
        bandwidth=2.04e12,
        link=300e9,  # NVLink 3
    ),
    "4090": Card(
        name="NVIDIA GeForce RTX 4090",
        compute=89,
        memory=23.5 * GIB,
        multiprocessors=128,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=72 * 2**20,
        clock=2_520_000,
        memory_clock=10_501_000,
        bus_width=384,
        bf16_flops=165e12,
        fp32_flops=82.6e12,
        attention=0.6,
        bandwidth=1.008e12,
        link=25e9,  # PCIe 4 x16
    ),
    "3090": Card(
        name="NVIDIA GeForce RTX 3090",
        compute=86,
        memory=23.6 * GIB,
        multiprocessors=82,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=6 * 2**20,
        clock=1_695_000,
        memory_clock=9_751_000,
        bus_width=384,
        bf16_flops=71e12,
        fp32_flops=35.6e12,
        attention=0.6,
        bandwidth=0.936e12,
        link=25e9,  # PCIe 4 x16
    ),
}
