/* A stand-in for libcuda.so.1 over host memory: the calls that omniport makes, with the driver's rules about threads,
 * contexts and captures. What is put into a stream is carried out when the stream is waited for, and not before.
 *
 * stub_fail makes a call fail; stub_fault says what the caller did that is wrong and that a GPU would not report.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long Address;
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400, ILLEGAL_STATE = 401, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901, CAPTURE_WRONG_THREAD = 908
};
enum { GLOBAL, LOCAL, RELAXED };
enum { DEVICE = 2, HOST = 1 };
#define MARGIN 256

/* injected errors, counts, faults */

typedef struct { char name[48]; long calls, fail_at; int status; } Entry;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Entry entries[64];
static int dead, initialized, devices = 1;
static char fault[400];
static long room = 1L << 40;
static char primary;
static __thread void *current;

static Entry *entry(const char *name) {
    for (int i = 0; i < 64; i++) {
        if (!entries[i].name[0]) strncpy(entries[i].name, name, 47);
        if (!strcmp(entries[i].name, name)) return &entries[i];
    }
    abort();
}

static void wrong(const char *text, Address where) {
    if (!fault[0]) snprintf(fault, sizeof fault, "%s (%#llx)", text, where);
}

static int is_fatal(int status) { return status == ILLEGAL_ADDRESS || status == LAUNCH_FAILED; }

/* the status with which a call has to fail now; 0: it may go on */
static int enter(const char *name, int needs_context) {
    Entry *found = entry(name);
    found->calls++;
    if (dead) return dead;
    if (found->fail_at && found->calls == found->fail_at) {
        if (is_fatal(found->status)) dead = found->status;
        return found->status;
    }
    if (!initialized && strcmp(name, "cuInit")) return NOT_INITIALIZED;
    return needs_context && current != &primary ? INVALID_CONTEXT : OK;
}

#define BEGIN(name, needs_context)                  \
    pthread_mutex_lock(&lock);                      \
    CUresult status = enter(name, needs_context);   \
    if (status) goto end;
#define END                                         \
    end: pthread_mutex_unlock(&lock);               \
    return status;
#define FAIL(value) do { status = (value); goto end; } while (0)

/* memory: every block has a margin on both sides, and is full of ones bits when it is new */

typedef struct Block { struct Block *next; char *start; size_t size; int kind; } Block;
static Block *blocks;

static Block *block_of(Address address, size_t size, int kind) {
    for (Block *b = blocks; b; b = b->next)
        if (b->kind == kind && address >= (Address)b->start && address + size <= (Address)b->start + b->size) return b;
    return NULL;
}

/* streams and graphs */

enum { COPY, FILL, CALL };
typedef struct {
    int kind, to_kind, source_kind, value;
    Address to, source;
    size_t to_pitch, pitch, width, rows;
    void (*function)(void *);
    void *data;
} Work;
typedef struct { Work *work; size_t count; } Queue;
typedef struct Stream {
    struct Stream *next;
    Queue queue, captured;
    int capturing, broken, mode;
    pthread_t thread;
} Stream;
typedef struct Graph { struct Graph *next; Queue queue; int executable; } Graph;
static Stream *streams;
static Graph *graphs;

static void push(Queue *queue, Work work) {
    queue->work = realloc(queue->work, (queue->count + 1) * sizeof work);
    queue->work[queue->count++] = work;
}

static void clear(Queue *queue) { free(queue->work); queue->work = NULL; queue->count = 0; }

static Stream *stream_of(void *handle) {
    for (Stream *s = streams; s; s = s->next) if (s == handle) return s;
    return NULL;
}

static Graph *graph_of(void *handle, int executable) {
    for (Graph *g = graphs; g; g = g->next) if (g == handle && g->executable == executable) return g;
    return NULL;
}

/* Calls that are unsafe while a stream is captured: forbidden to this thread by its own captures, and to all threads by
 * those of mode GLOBAL. A forbidden call breaks the capture as well. */
static int unsafe(void) {
    int status = OK;
    for (Stream *s = streams; s; s = s->next)
        if (s->capturing && (s->mode == GLOBAL || (s->mode == LOCAL && pthread_equal(s->thread, pthread_self())))) {
            s->broken = 1;
            status = CAPTURE_UNSUPPORTED;
        }
    return status;
}

static int allocated(void **out, size_t size, int kind) {
    int status = unsafe();
    if (status) return status;
    if (!size) return INVALID_VALUE;
    if ((long)size > room) return OUT_OF_MEMORY;
    Block *made = malloc(sizeof *made);
    char *memory = aligned_alloc(256, (size + 255) / 256 * 256 + 2 * MARGIN);
    memset(memory, 0xA5, MARGIN);
    memset(memory + MARGIN, 0xFF, size);
    memset(memory + MARGIN + size, 0xA5, MARGIN);
    *made = (Block){blocks, memory + MARGIN, size, kind};
    blocks = made;
    room -= (long)size;
    *out = made->start;
    return OK;
}

static int touches(const Queue *queue, const Block *block) {
    Address from = (Address)block->start, to = from + block->size;
    for (size_t i = 0; i < queue->count; i++) {
        const Work *w = &queue->work[i];
        if ((w->kind != CALL && w->to >= from && w->to < to) || (w->kind == COPY && w->source >= from && w->source < to))
            return 1;
    }
    return 0;
}

static int freed(Address address, int kind) {
    int status = unsafe();
    if (status) return status;
    for (Block **at = &blocks; *at; at = &(*at)->next) {
        Block *b = *at;
        if (b->kind != kind || (Address)b->start != address) continue;
        for (Stream *s = streams; s; s = s->next)
            if (touches(&s->queue, b)) wrong("memory was freed that waiting work uses", address);
        for (int i = 0; i < MARGIN; i++)
            if ((unsigned char)b->start[-1 - i] != 0xA5 || (unsigned char)b->start[b->size + i] != 0xA5)
                wrong("something wrote beside a block", address);
        room += (long)b->size;
        *at = b->next;
        free(b->start - MARGIN);
        free(b);
        return OK;
    }
    wrong("what was freed is no block", address);
    return INVALID_VALUE;
}

static int put(void *handle, Work work) {
    Stream *s = stream_of(handle);
    if (!s) { wrong("no such stream", (Address)handle); return INVALID_HANDLE; }
    if (s->capturing && s->broken) return CAPTURE_INVALIDATED;
    push(s->capturing ? &s->captured : &s->queue, work);
    return OK;
}

static int inside(const Work *w) {
    size_t to = w->rows ? (w->rows - 1) * w->to_pitch + w->width : 0;
    size_t from = w->rows ? (w->rows - 1) * w->pitch + w->width : 0;
    return block_of(w->to, to, w->to_kind) && (w->kind == FILL || block_of(w->source, from, w->source_kind));
}

/* Without the lock: a call goes back into the caller's program. */
static int carry_out(const Work *w) {
    if (w->kind == CALL) {
        w->function(w->data);
        return dead;
    }
    pthread_mutex_lock(&lock);
    if (!inside(w)) dead = ILLEGAL_ADDRESS;
    else
        for (size_t i = 0; i < w->rows; i++) {
            char *to = (char *)(w->to + i * w->to_pitch);
            if (w->kind == FILL) memset(to, w->value, w->width);
            else memmove(to, (char *)(w->source + i * w->pitch), w->width);
        }
    int status = dead;
    pthread_mutex_unlock(&lock);
    return status;
}

/* the driver's calls */

CUresult cuInit(unsigned flags) { BEGIN("cuInit", 0) (void)flags; initialized = 1; END }
CUresult cuDeviceGetCount(int *count) { BEGIN("cuDeviceGetCount", 0) *count = devices; END }
CUresult cuDeviceGet(int *device, int number) {
    BEGIN("cuDeviceGet", 0)
    if (number >= devices) FAIL(NO_DEVICE);
    *device = number;
    END
}
CUresult cuDeviceGetName(char *name, int size, int device) {
    BEGIN("cuDeviceGetName", 0)
    (void)device;
    snprintf(name, (size_t)size, "Stand-in 4090");
    END
}
CUresult cuDeviceGetAttribute(int *value, int number, int device) {
    BEGIN("cuDeviceGetAttribute", 0)
    (void)device;
    *value = number == 75 ? 8 : number == 76 ? 9 : 0;
    END
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    BEGIN("cuDevicePrimaryCtxRetain", 0)
    (void)device;
    *context = &primary;
    END
}
CUresult cuCtxSetCurrent(void *context) { BEGIN("cuCtxSetCurrent", 0) current = context; END }
CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    BEGIN("cuMemGetInfo_v2", 1)
    *free_bytes = (size_t)room;
    *total = (size_t)1 << 40;
    END
}
CUresult cuMemAlloc_v2(Address *out, size_t size) {
    BEGIN("cuMemAlloc_v2", 1)
    void *made = NULL;
    status = allocated(&made, size, DEVICE);
    *out = (Address)made;
    END
}
CUresult cuMemFree_v2(Address address) { BEGIN("cuMemFree_v2", 1) status = freed(address, DEVICE); END }
CUresult cuMemAllocHost_v2(void **out, size_t size) {
    BEGIN("cuMemAllocHost_v2", 1)
    status = allocated(out, size, HOST);
    END
}
CUresult cuMemFreeHost(void *address) { BEGIN("cuMemFreeHost", 1) status = freed((Address)address, HOST); END }

static Work copy(Address to, int to_kind, Address source, int source_kind, size_t size) {
    return (Work){.kind = COPY, .to_kind = to_kind, .source_kind = source_kind, .to = to, .source = source,
                  .to_pitch = size, .pitch = size, .width = size, .rows = 1};
}
CUresult cuMemcpyHtoDAsync_v2(Address to, const void *source, size_t size, void *stream) {
    BEGIN("cuMemcpyHtoDAsync_v2", 1)
    status = put(stream, copy(to, DEVICE, (Address)source, HOST, size));
    END
}
CUresult cuMemcpyDtoHAsync_v2(void *to, Address source, size_t size, void *stream) {
    BEGIN("cuMemcpyDtoHAsync_v2", 1)
    status = put(stream, copy((Address)to, HOST, source, DEVICE, size));
    END
}
typedef struct { size_t x, y; int kind; void *host; Address device; void *array; size_t pitch; } Side;
typedef struct { Side source, to; size_t width, rows; } Copy2D;
CUresult cuMemcpy2DAsync_v2(const Copy2D *c, void *stream) {
    BEGIN("cuMemcpy2DAsync_v2", 1)
    if (c->source.kind != DEVICE || c->to.kind != DEVICE || c->source.pitch < c->width || c->to.pitch < c->width)
        FAIL(INVALID_VALUE);
    Work work = copy(c->to.device, DEVICE, c->source.device, DEVICE, c->width);
    work.to_pitch = c->to.pitch;
    work.pitch = c->source.pitch;
    work.rows = c->rows;
    status = put(stream, work);
    END
}
CUresult cuMemsetD8Async(Address to, unsigned char value, size_t size, void *stream) {
    BEGIN("cuMemsetD8Async", 1)
    Work work = copy(to, DEVICE, 0, 0, size);
    work.kind = FILL;
    work.value = value;
    status = put(stream, work);
    END
}
CUresult cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    BEGIN("cuLaunchHostFunc", 1)
    status = put(stream, (Work){.kind = CALL, .function = function, .data = data});
    END
}
CUresult cuStreamCreate(void **out, unsigned flags) {
    BEGIN("cuStreamCreate", 1)
    (void)flags;
    Stream *made = calloc(1, sizeof *made);
    made->next = streams;
    streams = made;
    *out = made;
    END
}
CUresult cuStreamDestroy_v2(void *handle) {
    BEGIN("cuStreamDestroy_v2", 1)
    for (Stream **at = &streams; *at; at = &(*at)->next)
        if (*at == handle) {
            Stream *s = *at;
            if (s->capturing) { s->broken = 1; FAIL(CAPTURE_UNSUPPORTED); }
            *at = s->next;
            clear(&s->queue);
            free(s);
            FAIL(OK);
        }
    wrong("no such stream", (Address)handle);
    status = INVALID_HANDLE;
    END
}
CUresult cuStreamSynchronize(void *handle) {
    Queue queue = {0};
    BEGIN("cuStreamSynchronize", 1)
    Stream *s = stream_of(handle);
    if (!s) { wrong("no such stream", (Address)handle); FAIL(INVALID_HANDLE); }
    if (s->capturing) { s->broken = 1; FAIL(CAPTURE_UNSUPPORTED); }
    queue = s->queue;
    s->queue = (Queue){0};
end:
    pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < queue.count && !status; i++) status = carry_out(&queue.work[i]);
    clear(&queue);
    return status;
}
CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    BEGIN("cuStreamBeginCapture_v2", 1)
    Stream *s = stream_of(handle);
    if (!s) FAIL(INVALID_HANDLE);
    if (s->capturing) FAIL(ILLEGAL_STATE);
    s->capturing = 1;
    s->broken = 0;
    s->mode = mode;
    s->thread = pthread_self();
    END
}
static Graph *graph_with(const Queue *queue, int executable) {
    Graph *made = calloc(1, sizeof *made);
    for (size_t i = 0; i < queue->count; i++) push(&made->queue, queue->work[i]);
    made->executable = executable;
    made->next = graphs;
    return graphs = made;
}
CUresult cuStreamEndCapture(void *handle, void **out) {
    *out = NULL;
    pthread_mutex_lock(&lock);
    CUresult status = enter("cuStreamEndCapture", 1);
    Stream *s = stream_of(handle);
    if (!s) FAIL(status ? status : INVALID_HANDLE);
    if (!s->capturing) FAIL(status ? status : ILLEGAL_STATE);
    if (s->mode != RELAXED && !pthread_equal(s->thread, pthread_self())) FAIL(status ? status : CAPTURE_WRONG_THREAD);
    if (!status && s->broken) status = CAPTURE_INVALIDATED;
    if (!status) *out = graph_with(&s->captured, 0);
    s->capturing = 0; /* also when it failed */
    clear(&s->captured);
    END
}
CUresult cuGraphInstantiateWithFlags(void **out, void *handle, unsigned long long flags) {
    BEGIN("cuGraphInstantiateWithFlags", 1)
    (void)flags;
    Graph *graph = graph_of(handle, 0);
    if (!graph) FAIL(INVALID_HANDLE);
    *out = graph_with(&graph->queue, 1);
    END
}
CUresult cuGraphLaunch(void *handle, void *stream) {
    BEGIN("cuGraphLaunch", 1)
    Graph *graph = graph_of(handle, 1);
    if (!graph) { wrong("no such graph", (Address)handle); FAIL(INVALID_HANDLE); }
    for (size_t i = 0; i < graph->queue.count && !status; i++) status = put(stream, graph->queue.work[i]);
    END
}
static int graph_destroyed(void *handle, int executable) {
    for (Graph **at = &graphs; *at; at = &(*at)->next)
        if (*at == handle && (*at)->executable == executable) {
            Graph *graph = *at;
            *at = graph->next;
            clear(&graph->queue);
            free(graph);
            return OK;
        }
    wrong("no such graph", (Address)handle);
    return INVALID_HANDLE;
}
CUresult cuGraphDestroy(void *handle) { BEGIN("cuGraphDestroy", 1) status = graph_destroyed(handle, 0); END }
CUresult cuGraphExecDestroy(void *handle) { BEGIN("cuGraphExecDestroy", 1) status = graph_destroyed(handle, 1); END }

static const struct { int status; const char *name, *text; } names[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a capture from a different thread"},
};
static CUresult text_of(int status, const char **out, int name) {
    *out = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].status == status) { *out = name ? names[i].name : names[i].text; return OK; }
    return INVALID_VALUE;
}
CUresult cuGetErrorName(int status, const char **out) { return text_of(status, out, 1); }
CUresult cuGetErrorString(int status, const char **out) { return text_of(status, out, 0); }

/* what tests ask and set */

void stub_fail(const char *name, long calls, int status) { /* the call that is so many calls from now */
    pthread_mutex_lock(&lock);
    Entry *found = entry(name);
    found->fail_at = calls ? found->calls + calls : 0;
    found->status = status;
    pthread_mutex_unlock(&lock);
}
long stub_calls(const char *name) {
    pthread_mutex_lock(&lock);
    long calls = entry(name)->calls;
    pthread_mutex_unlock(&lock);
    return calls;
}
void stub_devices(int count) { devices = count; }
void stub_room(long bytes) { room = bytes; }
const char *stub_fault(void) { return fault; }
int stub_holds(Address address, size_t size) {
    pthread_mutex_lock(&lock);
    int found = block_of(address, size, DEVICE) != NULL || block_of(address, size, HOST) != NULL;
    pthread_mutex_unlock(&lock);
    return found;
}
long stub_left(int what) { /* 0: bytes, 1: streams, 2: graphs */
    long count = 0;
    pthread_mutex_lock(&lock);
    if (what == 0) for (Block *b = blocks; b; b = b->next) count += (long)b->size;
    if (what == 1) for (Stream *s = streams; s; s = s->next) count++;
    if (what == 2) for (Graph *g = graphs; g; g = g->next) count++;
    pthread_mutex_unlock(&lock);
    return count;
}
