/* A driver with VTA's public interface, whose machine is a function that the test hands over. What is defined when
 * it is compiled breaks it: LACKS_RUN, NO_MACHINE, UNALIGNED, NO_MEMORY. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BYTES (1u << 26)
#define PAGE 4096u

typedef int (*Machine)(uint32_t instructions, uint32_t count);

static uint8_t* memory;
static size_t used = PAGE;
static Machine machine;
static int flushed, invalidated;

uint8_t* StandInMemory(void) { return memory ? memory : (memory = aligned_alloc(PAGE, BYTES)); }
void StandInMachine(Machine given) { machine = given; }
int StandInFlushed(void) { return flushed; }
int StandInInvalidated(void) { return invalidated; }

void* VTADeviceAlloc(void) {
#ifdef NO_MACHINE
  return NULL;
#else
  return StandInMemory();
#endif
}
void VTADeviceFree(void* handle) { (void)handle; }

#ifndef LACKS_RUN
int VTADeviceRun(void* handle, uint32_t instructions, uint32_t count, uint32_t wait_cycles) {
  (void)handle;
  return wait_cycles == 1u << 31 ? machine(instructions, count) : 2;
}
#endif

void* VTAMemAlloc(size_t size, int cached) {
  (void)cached;
#ifdef NO_MEMORY
  return NULL;
#endif
  uint8_t* found = StandInMemory() + used;
  used += (size + PAGE - 1) / PAGE * PAGE;
  return used <= BYTES ? found : NULL;
}
void VTAMemFree(void* pointer) { (void)pointer; }
uint32_t VTAMemGetPhyAddr(void* pointer) {
#ifdef UNALIGNED
  return (uint32_t)((uint8_t*)pointer - memory) + 16;
#else
  return (uint32_t)((uint8_t*)pointer - memory);
#endif
}
void VTAMemCopyFromHost(void* to, const void* from, size_t size) { memcpy(to, from, size); }
void VTAMemCopyToHost(void* to, const void* from, size_t size) { memcpy(to, from, size); }
void VTAFlushCache(void* pointer, uint32_t address, int bytes) { (void)pointer, (void)address, flushed += bytes; }
void VTAInvalidateCache(void* pointer, uint32_t address, int bytes) {
  (void)pointer, (void)address, invalidated += bytes;
}
