/* What was asked of the device, counted by name, and a call back to Python where the host waits for
 * the device. */
#include "nullgpu.h"

typedef struct {
    char *name;
    u64 times;
    double
        amount; /* bytes of a copy, elements of an element-wise kernel, blocks of other kernels */
} Count;

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Count *counts;
static int n_counts;
static int *slots; /* open hash table of 1 + index into counts, at most half full */
static int n_slots;
static void (*on_wait)(const char *what);

static int *slot_of(const char *name) {
    unsigned hash = 2166136261u; /* FNV-1a */
    for (const char *c = name; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
    int *slot = slots + hash % n_slots;
    while (*slot && strcmp(counts[*slot - 1].name, name)) slot = slots + ++hash % n_slots;
    return slot;
}

static void grow(void) {
    free(slots);
    n_slots = 4 * n_slots + 4096;
    slots = calloc(n_slots, sizeof *slots);
    counts = realloc(counts, n_slots / 2 * sizeof *counts);
    for (int i = 0; i < n_counts; i++) *slot_of(counts[i].name) = i + 1;
}

void count_locked(const char *name, double amount) {
    if (2 * (n_counts + 1) > n_slots) grow();
    int *slot = slot_of(name);
    if (!*slot) {
        counts[n_counts++] = (Count){strdup(name), 0, 0.0};
        *slot = n_counts;
    }
    counts[*slot - 1].times++;
    counts[*slot - 1].amount += amount;
}

void count(const char *name, double amount) {
    pthread_mutex_lock(&lock);
    count_locked(name, amount);
    pthread_mutex_unlock(&lock);
}

static _Atomic u64 n_issued;
void issue(void) {
    n_issued++;
}
u64 issued(void) {
    return n_issued;
}

void waited(const char *what) {
    count(what, 0);
    void (*tell)(const char *) = on_wait;
    if (tell) tell(what);
}

/* For observe.py: the function to call at every wait; NULL: none. */
EXPORT void nullgpu_on_wait(void (*function)(const char *)) {
    on_wait = function;
}

/* For observe.py: all counts so far, one "name<TAB>times<TAB>amount" a line; valid until the next
 * call. */
EXPORT const char *nullgpu_counts(void) {
    static char *text;
    size_t size;
    free(text);
    FILE *out = open_memstream(&text, &size);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_counts; i++)
        fprintf(out, "%s\t%llu\t%.0f\n", counts[i].name, counts[i].times, counts[i].amount);
    pthread_mutex_unlock(&lock);
    fclose(out);
    return text;
}
