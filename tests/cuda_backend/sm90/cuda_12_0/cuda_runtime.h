// What pair_sm90_driver.h uses of the runtime, as CUDA 12.0 declares it.
#pragma once

#define CUDART_VERSION 12000

enum cudaError_t { cudaSuccess = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;

cudaError_t cudaGetLastError();
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* found = nullptr);
